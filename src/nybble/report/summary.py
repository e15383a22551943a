"""What a log says in few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from nybble.report.quant_log import ModuleLog

_SECTIONS = ("gdn", "attention", "mlp", "experts", "mtp", "lm_head")


@dataclass(frozen=True)
class SectionSummary:
    """The modules of one part, or of the MTP head. None: measured on none of them."""

    section: str
    modules: int
    bits: tuple[int, ...]
    """All that occur, ascending."""
    median_error: float | None
    worst_error: float | None
    error_ratio: float | None
    """Median over the modules of output error over that of rounding to nearest."""
    median_sqnr_db: float
    worst_sqnr_db: float
    too_few_tokens: int | None
    """Experts' Linears that could not be calibrated; None where there are no experts."""
    damping_increases: int | None
    """Over all modules; those that share an input count one by one."""
    dead_channels: int | None
    """Over all modules, counted likewise."""
    seconds: float | None


def summarize(rows: Sequence[ModuleLog]) -> list[SectionSummary]:
    """One summary for each part that occurs, in the order of a model; unknown parts last."""
    found = {row.part for row in rows}
    order = [name for name in _SECTIONS if name in found] + sorted(found.difference(_SECTIONS))
    return [_summary(name, [row for row in rows if row.part == name]) for name in order]


def worst_modules(rows: Sequence[ModuleLog], count: int) -> list[ModuleLog]:
    """The ``count`` modules with the largest output error, worst first.

    Where no module's error was measured: with the lowest signal to noise ratio.
    """
    measured = [row for row in rows if row.output_error is not None]
    if measured:
        return sorted(measured, key=lambda row: (-(row.output_error or 0), row.module))[:count]
    return sorted(rows, key=lambda row: (row.sqnr_db, row.module))[:count]


def block_seconds(rows: Iterable[ModuleLog]) -> float:
    """Time of all blocks: every row of a block repeats the block's."""
    return math.fsum({row.block: row.block_seconds for row in rows}.values())


def headline(rows: Sequence[ModuleLog]) -> str:
    """Algorithm and bits: ``gptq, INT4`` or ``gptq, INT4 + INT8``."""
    algorithms = " + ".join(sorted({row.algorithm for row in rows}))
    return f"{algorithms}, {' + '.join(f'INT{bits}' for bits in sorted({r.bits for r in rows}))}"


def error_measure(rows: Sequence[ModuleLog]) -> str:
    """What the log's output error is: algorithms measure it by what they know of the inputs."""
    known = {row.algorithm == "gptq" for row in rows if row.output_error is not None}
    correlated, uncorrelated = "by the inputs' second moments", "as if inputs were uncorrelated"
    if known == {True, False}:
        return f"gptq: {correlated}; else: {uncorrelated}"
    return correlated if known == {True} else uncorrelated


def _summary(section: str, rows: list[ModuleLog]) -> SectionSummary:
    errors = [row.output_error for row in rows if row.output_error is not None]
    ratios = [row.error_ratio for row in rows if row.error_ratio is not None]
    increases = [row.damping_increases for row in rows if row.damping_increases is not None]
    dead = [row.dead_channels for row in rows if row.dead_channels is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    experts = [row.too_few_tokens for row in rows if row.is_expert]
    return SectionSummary(
        section=section,
        modules=len(rows),
        bits=tuple(sorted({row.bits for row in rows})),
        median_error=median(errors) if errors else None,
        worst_error=max(errors, default=None),
        error_ratio=median(ratios) if ratios else None,
        median_sqnr_db=median(row.sqnr_db for row in rows),
        worst_sqnr_db=min(row.sqnr_db for row in rows),
        too_few_tokens=sum(experts) if experts else None,
        damping_increases=sum(increases) if increases else None,
        dead_channels=sum(dead) if dead else None,
        seconds=math.fsum(seconds) if seconds else None,
    )
