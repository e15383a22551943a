"""The doctor's main path: a checkpoint in, findings and a verdict per engine out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.doctor.case import Case, Check
from nybble.doctor.checks import base as against_base
from nybble.doctor.checks import (
    config,
    exclusions,
    files,
    index,
    mtp,
    order,
    resolution,
    rules,
    sidecars,
    tensors,
)
from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.findings import Finding, Severity
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.built import Block
from nybble.doctor.resolve.methods import declared_block
from nybble.doctor.resolve.patterns import Patterns
from nybble.doctor.simulate import simulate
from nybble.doctor.snapshot import Snapshot, take_snapshot
from nybble.doctor.source import open_source
from nybble.doctor.stored import stored_linears
from nybble.doctor.verdict import Verdict, verdicts

_CHECKS: tuple[Check, ...] = tuple(
    check
    for group in (
        files,
        index,
        sidecars,
        config,
        rules,
        exclusions,
        resolution,
        mtp,
        tensors,
        order,
        against_base,
    )
    for check in group.CHECKS
)
"""Those that need headers alone."""

_SEVERITIES = tuple(Severity)


@dataclass(frozen=True)
class Report:
    """All that was found in one checkpoint."""

    checkpoint: str
    base: str | None
    deep: bool
    method: str | None
    """The declared ``quant_method``; None: unquantized."""
    findings: tuple[Finding, ...]
    """The gravest first, then by code."""
    verdicts: tuple[Verdict, ...]
    """One per engine that was asked for."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong, as far as the rules are known."""
        no_error = all(finding.severity is not Severity.ERROR for finding in self.findings)
        return no_error and all(verdict.is_clean for verdict in self.verdicts)

    @property
    def is_known(self) -> bool:
        """Whether at least one engine's rules are known for it."""
        return any(verdict.unknown is None for verdict in self.verdicts)


def check_checkpoint(
    where: str,
    *,
    base: str | None = None,
    engines: tuple[Engine, ...] = ENGINES,
    tensor_parallel: int = 1,
    deep: bool = False,
) -> Report:
    """Predicts what each engine makes of a checkpoint, from headers alone.

    ``where`` and ``base``, the BF16 checkpoint it was made from, are folders, hub repositories or
    web addresses. ``deep`` also reads scales, zero points and all kept tensors. Raises
    CheckpointError if there is no checkpoint to read.
    """
    snapshot = take_snapshot(open_source(where))
    original = take_snapshot(open_source(base)) if base is not None else None
    case = open_case(snapshot, original, engines, tensor_parallel)
    checks = _CHECKS
    if deep:
        # numpy takes longer to import than all the rest takes.
        from nybble.doctor.checks import values

        checks += values.CHECKS
    found = [finding for check in checks for finding in check(case)]
    found.sort(key=lambda finding: (_SEVERITIES.index(finding.severity), _number(finding.code)))
    return Report(
        checkpoint=where,
        base=base,
        deep=deep,
        method=_method_name(case.block),
        findings=tuple(found),
        verdicts=verdicts(case, found),
    )


def open_case(
    snapshot: Snapshot,
    base: Snapshot | None = None,
    engines: tuple[Engine, ...] = ENGINES,
    tensor_parallel: int = 1,
) -> Case:
    """What the checks look at; raises nothing."""
    config = snapshot.config or {}
    layout, problem = _layout(snapshot.config)
    block = config.get("quantization_config")
    stored, simulations = {}, []
    if layout is not None:
        stored = stored_linears(layout, snapshot.all_tensors())
        patterns = Patterns()
        for engine in engines:
            its_block = declared_block(engine.family, config, snapshot.objects)
            simulations.append(simulate(snapshot, layout, its_block, engine, patterns))
    return Case(
        snapshot=snapshot,
        block=block if isinstance(block, dict) else None,
        layout=layout,
        layout_problem=problem,
        stored=stored,
        simulations=tuple(simulations),
        engines=engines,
        base=base,
        tensor_parallel=tensor_parallel,
    )


def _layout(config: Mapping[str, Any] | None) -> tuple[Layout | None, str | None]:
    """The layout, or why there is none; both None: the architecture is unknown."""
    try:
        return (None, None) if config is None else (layout_of(config), None)
    except CheckpointError as error:
        return None, str(error)


def _method_name(block: Block | None) -> str | None:
    name = (block or {}).get("quant_method")
    return name if isinstance(name, str) else None


def _number(code: str) -> int:
    return int(code.removeprefix("D"))
