"""What the doctor has to say: findings, and the harm each does in each engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from nybble.doctor.engines import Engine


class Severity(StrEnum):
    """How much a finding matters, whatever the engine."""

    ERROR = "error"
    """Some engine fails, or computes something else than the checkpoint's maker meant."""
    WARNING = "warning"
    """It works today, and breaks with another setting, engine or release."""
    NOTE = "note"


class Part(StrEnum):
    """What a harm hits. An engine that is not asked for the MTP head or for images never meets
    theirs."""

    TRUNK = "trunk"
    """The decoder, embeddings and output head: without them there is nothing."""
    MTP = "mtp"
    VISION = "vision"


class Harm(IntEnum):
    """What becomes of a part; greater is worse for whoever serves it."""

    NONE = 0
    ABSENT = 1
    """The part is not there, and the engine does without."""
    REFUSED = 2
    """The engine raises an error as soon as the part is asked for."""
    WRONG = 3
    """It computes with wrong numbers, in silence."""
    RANDOM = 4
    """Some of its parameters keep what was in memory, in silence."""


@dataclass(frozen=True)
class Hit:
    """The harm that a finding does to one part in one engine."""

    engine: Engine
    part: Part
    harm: Harm
    raises: str | None = None
    """The exception's name, of a part that is refused."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, with all that is needed to act on it."""

    code: str
    """'D3': which check found it."""
    severity: Severity
    where: str
    """Tensor, module, file or rule; the first of several."""
    seen: str
    """What was found there, one line; says how many, if there are several."""
    consequence: str
    """What the engines make of it, one line."""
    fix: str
    """What to do, one line."""
    evidence: str = ""
    """Where the consequence is on record: 'vllm#53387', 'vLLM 0.32, auto_gptq.py'."""
    hits: tuple[Hit, ...] = ()
    repair: str | None = None
    """The action of ``nybble repair`` that mends it."""


def worst(hits: Iterable[Hit]) -> Hit | None:
    """The hit with the greatest harm; of equals the first that names its exception."""
    return max(hits, key=lambda hit: (hit.harm, hit.raises is not None), default=None)
