"""Kinds of modules, and how each is drawn: alike in every figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

Dashes = tuple[float, tuple[float, ...]]
"""Offset, then lengths of strokes and gaps in line widths; without any: a solid line."""

SOLID: Dashes = (0, ())
_EXPERTS: Dashes = (0, (4, 1.5))
_SHARED_EXPERT: Dashes = (0, (1, 1))

# Okabe and Ito's palette, told apart by the colour-blind; its yellow is too pale for lines.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _BLACK = "#CC79A7", "#56B4E9", "#000000"
# By a kind's last word. Those that stand in one panel differ in colour and marker.
_KNOWN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "in_proj_qkv": (_BLUE, "o"),
        "in_proj_z": (_SKY, "s"),
        "out_proj": (_GREEN, "^"),
        "q_proj": (_ORANGE, "D"),
        "k_proj": (_RED, "v"),
        "v_proj": (_PURPLE, "P"),
        "o_proj": (_BLACK, "X"),
        "gate_proj": (_BLUE, "o"),
        "up_proj": (_ORANGE, "s"),
        "down_proj": (_GREEN, "^"),
        "lm_head": (_RED, "D"),
    }
)
_OTHERS = tuple(zip((_PURPLE, _SKY, _RED, _BLACK, _GREEN), ("<", ">", "h", "p", "*"), strict=True))


@dataclass(frozen=True)
class Style:
    """How a kind is drawn."""

    colour: str
    marker: str
    dashes: Dashes


def kind_of(module: str) -> str:
    """``….layers.3.mlp.experts.17.up_proj`` -> ``experts.up_proj``; ``lm_head`` -> itself."""
    inner = re.split(r"\.\d+\.", module, maxsplit=1)[-1].split(".")
    return ".".join(word for word in inner[1:] or inner if not word.isdecimal())


def styles(kinds: Iterable[str]) -> dict[str, Style]:
    """The style of each kind, in a legend's order: plain ones first, then experts."""
    split = {kind: tuple(kind.split(".")) for kind in kinds}
    order = [*_KNOWN, *sorted({words[-1] for words in split.values()}.difference(_KNOWN))]
    looks = {
        word: _KNOWN.get(word, _OTHERS[(number - len(_KNOWN)) % len(_OTHERS)])
        for number, word in enumerate(order)
    }
    return {
        kind: Style(*looks[words[-1]], dashes=_dashes(words[0]))
        for kind, words in sorted(split.items(), key=lambda k: (k[1][:-1], order.index(k[1][-1])))
    }


def _dashes(owner: str) -> Dashes:
    if owner == "experts":
        return _EXPERTS
    return _SHARED_EXPERT if owner.startswith("shared_expert") else SOLID
