"""Kinds of modules, and how each is drawn: alike in every figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from nybble.report.style import (
    BLACK,
    BLUE,
    DASHED,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SOLID,
    Dashes,
    Style,
)

_SHARED_EXPERT: Dashes = (0, (1, 1))

# By a kind's last word. Those that stand in one panel differ in colour and marker.
_KNOWN: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "in_proj_qkv": (BLUE, "o"),
        "in_proj_z": (SKY, "s"),
        "out_proj": (GREEN, "^"),
        "q_proj": (ORANGE, "D"),
        "k_proj": (RED, "v"),
        "v_proj": (PURPLE, "P"),
        "o_proj": (BLACK, "X"),
        "gate_proj": (BLUE, "o"),
        "up_proj": (ORANGE, "s"),
        "down_proj": (GREEN, "^"),
        "lm_head": (RED, "D"),
    }
)
_OTHERS = tuple(zip((PURPLE, SKY, RED, BLACK, GREEN), ("<", ">", "h", "p", "*"), strict=True))


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
        return DASHED
    return _SHARED_EXPERT if owner.startswith("shared_expert") else SOLID
