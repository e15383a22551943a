"""The engines whose rules are known, each at the releases that share a rule set.

What changed between the releases of vLLM, as far as it decides how a checkpoint loads:

    0.24  AutoRound's rules for fused modules hold; Marlin pads its tiles
    0.26  a tensor without a parameter is an error, no longer skipped in silence
    0.28  a GPTQ rule may keep the MTP layer dense; text-only configs get an MTP head
    0.30  groups sorted by activation are refused; g_idx is dropped
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from nybble.core.errors import RecipeError

Version = tuple[int, int]
"""Major and minor."""


class Family(StrEnum):
    """An engine, whatever its release."""

    VLLM = "vllm"
    TRANSFORMERS = "transformers"
    SGLANG = "sglang"


@dataclass(frozen=True)
class Engine:
    """One engine, at the releases ``first`` to ``last``."""

    family: Family
    first: Version
    last: Version

    @property
    def id(self) -> str:
        """'vllm-0.26': for results that programs read."""
        return f"{self.family}-{_dotted(self.first)}"

    @property
    def label(self) -> str:
        """'vLLM 0.26-0.27': for people."""
        span = _dotted(self.first)
        if self.last != self.first:
            span += f"-{_dotted(self.last)}"
        return f"{_NAMES[self.family]} {span}"

    def joined(self, later: Engine) -> Engine:
        """One engine at all releases from this one's to a later one's."""
        return Engine(self.family, self.first, later.last)

    def is_vllm(self, since: Version = (0, 0), before: Version = (1, 0)) -> bool:
        """Whether it is a vLLM of these releases."""
        return self.family is Family.VLLM and since <= self.first < before


_NAMES = {Family.VLLM: "vLLM", Family.TRANSFORMERS: "Transformers", Family.SGLANG: "SGLang"}

ENGINES = (
    Engine(Family.VLLM, (0, 19), (0, 23)),
    Engine(Family.VLLM, (0, 24), (0, 25)),
    Engine(Family.VLLM, (0, 26), (0, 27)),
    Engine(Family.VLLM, (0, 28), (0, 29)),
    Engine(Family.VLLM, (0, 30), (0, 32)),
    Engine(Family.TRANSFORMERS, (5, 23), (5, 23)),
    Engine(Family.SGLANG, (0, 5), (0, 5)),
)
"""All rule sets, those of one engine in the order of its releases."""


def chosen_engines(name: str = "all", version: str | None = None) -> tuple[Engine, ...]:
    """The rule sets of one engine, or all; with a version, that of the release.

    A release newer than all that are known has the rules of the newest. Raises RecipeError for a
    name that is none, and for a version that is none, is older than all rules or comes without
    one engine.
    """
    if name != "all" and name not in set(Family):
        raise RecipeError(f"engine {name!r} is unknown: give {', '.join(Family)} or all")
    found = tuple(engine for engine in ENGINES if name in ("all", engine.family))
    if version is None:
        return found
    if name == "all":
        raise RecipeError("--engine-version needs --engine: a release is one engine's")
    match = re.fullmatch(r"v?(\d+)\.(\d+)(\.\w+)*", version)
    if match is None:
        raise RecipeError(f"--engine-version {version!r} is no release: give one like 0.32")
    release = (int(match[1]), int(match[2]))
    older = [engine for engine in found if engine.first <= release]
    if not older:
        raise RecipeError(
            f"no rules are known for {name} {version}: the oldest are those of "
            f"{_dotted(found[0].first)}"
        )
    return (older[-1],)


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
