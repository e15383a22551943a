"""D9 and D10: quantized Linears that engines serve only under conditions, and their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nybble.doctor.case import Case
from nybble.doctor.checks.common import clean, counted
from nybble.doctor.engines import Engine
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.fitting import splits_inputs
from nybble.doctor.layout.spec import LM_HEAD, Kind, Linear, Module
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.wording import names_of, spoken

DEGREES = (8, 4, 2, 1)
"""Of tensor parallelism."""

_GATES = ("in_proj_a", "in_proj_b", "in_proj_ba")
_TILE_OUTS, _TILE_INS = 64, 128


@dataclass(frozen=True)
class _Delicate:
    """A sort of Linear that is better kept dense."""

    severity: Severity
    seen: str
    consequence: str
    evidence: str


_DELICATE = {
    "gates": _Delicate(
        Severity.WARNING,
        "the gates of Gated DeltaNet are quantized",
        "vLLM up to 0.23 has no kernel for their few rows, and on several devices they are cut "
        "apart or copied, by release and format",
        "vllm#35924, vllm#36329",
    ),
    "vision": _Delicate(
        Severity.WARNING,
        "the vision tower is quantized",
        "its small matrices fit few kernels, and most tools and rules take it for dense",
        "vLLM 0.32, marlin.py can_implement",
    ),
    "head": _Delicate(
        Severity.NOTE,
        "the output head is quantized",
        "vLLM up to 0.23 and SGLang need the declaration to say so in their own way",
        "auto-round#1650, auto-round#1709",
    ),
}


def delicate_linears(case: Case) -> Iterator[Finding]:
    """D9: gates, vision tower and output head, which engines handle best in BF16."""
    groups: dict[str, list[str]] = {}
    for name, stored in case.stored.items():
        sort = _sort(case, name)
        if sort is not None and any(scheme != DENSE for scheme in stored.schemes):
            groups.setdefault(sort, []).append(name)
    for sort, names in groups.items():
        told = _DELICATE[sort]
        yield Finding(
            code="D9",
            severity=told.severity,
            where=clean(names[0]),
            seen=f"{told.seen}: {counted(names, 'Linear')}",
            consequence=told.consequence,
            fix="keep them in the base's type and exclude them from quantization",
            evidence=told.evidence,
        )


def _sort(case: Case, name: str) -> str | None:
    if name.rpartition(".")[2] in _GATES:
        return "gates"
    if case.layout is not None and case.layout.part_of(name) is Part.VISION:
        return "vision"
    return "head" if name == LM_HEAD else None


@dataclass
class _Refused:
    """Modules that an engine has no kernel for."""

    linears: dict[str, None] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)
    hits: dict[tuple[Engine, Part], None] = field(default_factory=dict)


def without_kernel(case: Case) -> Iterator[Finding]:
    """D7, D10: shapes that vLLM finds no kernel for, at the degree of parallelism asked for.

    Groups must lie within one device's share of the inputs; before 0.24 its share must also fill
    tiles of 64 outputs and 128 inputs (vLLM 0.19 and 0.32, kernels/linear, marlin.py).
    """
    degree = max(case.tensor_parallel, 1)
    found: dict[str, _Refused] = {}
    for engine, module, built in _packed_modules(case):
        for linear, shape in _shapes(module):
            reason = _misfit(engine, shape, built, splits_inputs(linear.name), degree)
            if reason is not None:
                parts_groups = _parts_groups(built, shape[1], shape[1])
                refused = found.setdefault("D7" if parts_groups else "D10", _Refused())
                refused.linears[linear.name] = None
                refused.reasons[reason] = None
                refused.hits[engine, module.part] = None
    for code, refused in found.items():
        hits = tuple(Hit(engine, part, Harm.REFUSED, "ValueError") for engine, part in refused.hits)
        yield Finding(
            code=code,
            severity=Severity.ERROR,
            where=clean(next(iter(refused.linears))),
            seen=f"{next(iter(refused.reasons))}: {counted(refused.linears, 'Linear')}",
            consequence=f"{spoken(hits)}: there is no kernel for the shape",
            fix="serve with less tensor parallelism"
            if degree > 1
            else "keep these Linears dense, or take a group size that divides them",
            evidence="vLLM 0.19 and 0.32, marlin.py can_implement; vllm#35924",
            hits=hits,
        )


def largest_degree(case: Case) -> Iterator[Finding]:
    """D10, as a note: over how many devices vLLM can spread the checkpoint."""
    matrices: dict[Engine, dict[_Matrix, str]] = {}
    for engine, module, built in _packed_modules(case):
        for linear, shape in _shapes(module):
            matrix = (shape, built, splits_inputs(linear.name))
            matrices.setdefault(engine, {}).setdefault(matrix, linear.name)
    engines: dict[int, list[Engine]] = {}
    for engine, found in matrices.items():
        fitting = (d for d in DEGREES if not any(_misfit(engine, *m, d) for m in found))
        degree = next(fitting, None)
        if degree is not None:
            engines.setdefault(degree, []).append(engine)
    if engines:
        yield Finding(
            code="D10",
            severity=Severity.NOTE,
            where="quantization_config",
            seen="the shapes of the quantized Linears limit tensor parallelism",
            consequence="devices that can share it: "
            + "; ".join(
                f"{names_of(those)}: {degree if degree > 1 else 'one'} at most"
                for degree, those in sorted(engines.items())
            ),
            fix="none needed",
            evidence="vLLM 0.32, marlin.py can_implement",
        )


CHECKS = (delicate_linears, without_kernel, largest_degree)

_Matrix = tuple[tuple[int, int], Scheme, bool]
"""[N, K], how it is built, and whether devices split its inputs."""


def _packed_modules(case: Case) -> Iterator[tuple[Engine, Module, Scheme]]:
    for simulation in case.simulations:
        for module, built in simulation.built if simulation.engine.is_vllm() else ():
            is_integer = isinstance(built, Scheme) and built.storage in _MARLIN
            if is_integer and module.kind is not Kind.HEAD and isinstance(built, Scheme):
                yield simulation.engine, module, built


_MARLIN = (Storage.GPTQ, Storage.PACKED)


def _shapes(module: Module) -> Iterable[tuple[Linear, tuple[int, int]]]:
    """The matrices that a kernel sees, each with a Linear in it: fused ones are one."""
    if module.kind is Kind.EXPERTS:
        return [(linear, linear.shape) for linear in module.members[:3]]
    first = module.members[0]
    return [(first, (sum(linear.shape[0] for linear in module.members), first.shape[1]))]


def _misfit(
    engine: Engine, shape: tuple[int, int], built: Scheme, by_inputs: bool, degree: int
) -> str | None:
    """Why no kernel takes a device's share of a matrix [N, K]; None: one does."""
    outs, ins = shape
    share_outs, share_ins = (outs, ins / degree) if by_inputs else (outs / degree, ins)
    if _parts_groups(built, ins, share_ins):
        return f"groups of {built.group_size} do not fit {share_ins:g} inputs per device"
    if engine.is_vllm(before=(0, 24)) and (share_outs % _TILE_OUTS or share_ins % _TILE_INS):
        return (
            f"[{share_outs:g}, {share_ins:g}] per device does not fill tiles of "
            f"{_TILE_OUTS} outputs and {_TILE_INS} inputs"
        )
    return None


def _parts_groups(built: Scheme, ins: int, share: float) -> bool:
    """Whether a device's share of the inputs ends within a group."""
    group = built.group_size or -1
    return 0 < group < ins and share % group != 0
