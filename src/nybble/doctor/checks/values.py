"""What only the values tell (``--deep``): D7, D8, D11, D17 and D19.

Tensors are read by ranges of bytes and never whole, so that their size does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nybble.checkpoint.headers import ITEM_BYTES, TensorInfo
from nybble.core.errors import CheckpointError
from nybble.doctor.case import Case, Check
from nybble.doctor.checks.base import kept_tensors
from nybble.doctor.checks.common import clean, counted, hits
from nybble.doctor.engines import Engine, Family
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.layout.spec import part_of
from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.stored import FLOATS
from nybble.doctor.zero_points import BITS, ZeroPoints, zero_point_convention

_CHUNK_BYTES = 12 * 2**20
"""A whole number of elements of all types, and of the runs of words that hold 3-bit fields."""
_MIN_SCALE = 2.0**-14
"""The smallest normal number of FP16."""
_SCALES = ("scales", "weight_scale")
_EXPONENTS: dict[str, tuple[str, int]] = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
"""Type of the bits, and those of them that are all set in what is infinite or no number."""


class _Fault(Enum):
    """What is wrong with a scale."""

    ZERO = auto()
    ROUNDED = auto()
    """BF16 or FP16 does not hold it exactly."""


def deep_findings(case: Case) -> Iterator[Finding]:
    """Everything that is wrong with the values; ends early if they cannot be read."""
    try:
        for check in _CHECKS:
            yield from check(case)
    except CheckpointError as error:
        yield Finding(
            code="D2",
            severity=Severity.ERROR,
            where=clean(case.snapshot.source.label),
            seen=str(error),
            consequence="the values were not checked to the end",
            fix="try again; if it happens again, the file is damaged",
        )


def non_finite(case: Case) -> Iterator[Finding]:
    """D19: infinities and NaN among weights that are stored as they are, and among scales."""
    floats = [info for info in case.snapshot.all_tensors().values() if info.dtype in FLOATS]
    bad = [info.name for info in floats if any(map(_has_non_finite(info), _read(case, info)))]
    if bad:
        yield _values_finding(
            case, "D19", bad, "infinite or not a number", "all that passes through them is lost"
        )


def scales(case: Case) -> Iterator[Finding]:
    """D19: scales that are zero, or that engines round to different numbers."""
    zero, rounded = [], []
    for name, stored in case.stored.items():
        for suffix in _SCALES:
            info = stored.tensors.get(suffix)
            if info is None or info.dtype not in FLOATS:
                continue
            faults = {fault for data in _read(case, info) for fault in _faults(info, data)}
            if _Fault.ZERO in faults:
                zero.append(f"{name}.{suffix}")
            if _Fault.ROUNDED in faults:
                rounded.append(f"{name}.{suffix}")
    if zero:
        yield Finding(
            code="D19",
            severity=Severity.WARNING,
            where=clean(zero[0]),
            seen=f"{counted(zero, 'tensor')} with scales of zero",
            consequence="their groups of weights are all zero; kernels that divide get NaN",
            fix="quantize these Linears again",
        )
    if rounded:
        yield Finding(
            code="D19",
            severity=Severity.NOTE,
            where=clean(rounded[0]),
            seen=f"{counted(rounded, 'tensor')} with scales that BF16 or FP16 cannot hold exactly",
            consequence="vLLM rounds them to the model's type: engines differ in the last digits",
            fix="nothing, unless engines have to agree: then quantize with scales exact in both",
            evidence="vLLM 0.32, parameter.py",
        )


def zero_points(case: Case) -> Iterator[Finding]:
    """D11: zero points by the other convention than the declaration's (formats with ``qzeros``)."""
    block = case.block or {}
    if block.get("sym") is not True:
        return
    declared = ZeroPoints.V1
    if "gptq_v2" in (block.get("checkpoint_format"), block.get("format")):
        declared = ZeroPoints.V2
    found: dict[ZeroPoints, list[str]] = {}
    for name, stored in case.stored.items():
        info = stored.tensors.get("qzeros")
        bits = _bits(stored.schemes)
        if info is not None and info.dtype == "I32" and bits is not None:
            chunks = (np.frombuffer(data, dtype="<i4") for data in _read(case, info))
            kinds = {zero_point_convention(chunk, bits) for chunk in chunks}
            kind = kinds.pop() if len(kinds) == 1 else ZeroPoints.ASYMMETRIC
            found.setdefault(kind, []).append(f"{name}.qzeros")
    found.pop(declared, None)
    for convention, names in found.items():
        if convention is ZeroPoints.ASYMMETRIC:
            seen = "neither convention's zero points of symmetric weights"
            consequence = "vLLM and SGLang ignore them and compute with the middle of the grid"
            engines = [e for e in case.engines if e.family is not Family.TRANSFORMERS]
        else:
            seen = f"zero points as in {convention}, the declaration means {declared}"
            consequence = (
                "vLLM and SGLang ignore them; in Transformers every weight is one step off"
            )
            engines = [e for e in case.engines if e.family is Family.TRANSFORMERS]
        yield Finding(
            code="D11",
            severity=Severity.ERROR,
            where=clean(names[0]),
            seen=f"{counted(names, 'tensor')}: {seen}",
            consequence=consequence,
            fix="store the other convention's, or quantize again if they are asymmetric",
            evidence="GPTQModel, utils/model.py; vLLM 0.32, auto_gptq.py",
            hits=hits(engines, map(part_of, names), Harm.WRONG),
            repair=None if convention is ZeroPoints.ASYMMETRIC else "zero-points",
        )


def group_order(case: Case) -> Iterator[Finding]:
    """D8: inputs in an order of their own, which the declaration does not say."""
    if (case.block or {}).get("desc_act"):
        return
    sorted_names = []
    for name, stored in case.stored.items():
        info, scheme = stored.tensors.get("g_idx"), stored.scheme
        if info is None or info.dtype != "I32" or scheme is None or case.layout is None:
            continue
        size = scheme.group_size
        inputs = case.layout.linears[name].shape[1]
        if size is not None and not _is_in_order(case, info, inputs if size == -1 else size):
            sorted_names.append(f"{name}.g_idx")
    if sorted_names:
        yield _values_finding(
            case,
            "D8",
            sorted_names,
            "not k // group_size, though desc_act is not true",
            "vLLM and SGLang apply each scale to the wrong inputs, in silence",
            [engine for engine in case.engines if engine.family is not Family.TRANSFORMERS],
        )


def declared_shapes(case: Case) -> Iterator[Finding]:
    """D7: ``weight_shape`` against the Linear's real shape."""
    if case.layout is None:
        return
    wrong = []
    for name, stored in case.stored.items():
        info = stored.tensors.get("weight_shape")
        if info is None or info.dtype not in ("I64", "I32") or info.numel != 2:
            continue
        data = b"".join(_read(case, info))
        shape = np.frombuffer(data, dtype="<i8" if info.dtype == "I64" else "<i4")
        if tuple(shape.tolist()) != case.layout.linears[name].shape:
            wrong.append(f"{name}.weight_shape")
    if wrong:
        yield _values_finding(
            case,
            "D7",
            wrong,
            "not the shape [N, K] of the Linear",
            "vLLM ignores them; Transformers unpacks to this shape and fails, or is wrong",
            [engine for engine in case.engines if engine.family is Family.TRANSFORMERS],
        )


def kept_values(case: Case) -> Iterator[Finding]:
    """D17: the bytes of what was kept against the base's."""
    changed: dict[Part, list[str]] = {}
    for info, original in kept_tensors(case):
        if (info.dtype, info.shape) == (original.dtype, original.shape) and case.base is not None:
            pairs = zip_longest(_read(case, info), _chunks(case.base, original))
            if any(mine != theirs for mine, theirs in pairs):
                changed.setdefault(part_of(info.name), []).append(info.name)
    method = (case.block or {}).get("quant_method")
    for part, names in changed.items():
        smoothed = part is Part.TRUNK and method in ("awq", "compressed-tensors")
        yield _values_finding(
            case,
            "D17",
            names,
            "not the base's values",
            "AWQ and SmoothQuant scale norms on purpose; anything else is damage"
            if smoothed
            else "engines compute with other weights than the base's",
            () if smoothed else case.engines,
            "graft-mtp" if part is Part.MTP else None,
        )


def _values_finding(
    case: Case,
    code: str,
    names: list[str],
    seen: str,
    consequence: str,
    engines: Iterable[Engine] | None = None,
    repair: str | None = None,
) -> Finding:
    found = hits(case.engines if engines is None else engines, map(part_of, names), Harm.WRONG)
    return Finding(
        code=code,
        severity=Severity.ERROR if found else Severity.WARNING,
        where=clean(names[0]),
        seen=f"{counted(names, 'tensor')}: {seen}",
        consequence=consequence,
        fix="take them from the base, or quantize these Linears again",
        hits=found,
        repair=repair,
    )


def _read(case: Case, info: TensorInfo) -> Iterator[bytes]:
    return _chunks(case.snapshot, info)


def _chunks(snapshot: Snapshot, info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes in order. Raises CheckpointError if the source fails or the file ends."""
    for start in range(info.start, info.stop, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, info.stop)
        data = snapshot.source.read(info.file.name, start, stop)
        if len(data) != stop - start:
            raise CheckpointError(f"{info.file.name}: ends within tensor {clean(info.name)}")
        yield data


def _has_non_finite(info: TensorInfo) -> Callable[[bytes], bool]:
    bits, exponent = _EXPONENTS[info.dtype]
    return lambda data: bool(((np.frombuffer(data, dtype=bits) & exponent) == exponent).any())


def _decoded(info: TensorInfo, data: bytes) -> NDArray[Any]:
    if info.dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, dtype=f"<f{ITEM_BYTES[info.dtype]}")


def _faults(info: TensorInfo, data: bytes) -> Iterator[_Fault]:
    values = _decoded(info, data)
    if (values == 0).any():
        yield _Fault.ZERO
    values = values[np.isfinite(values) & (values != 0)]
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype("<f4")
    # BF16 is the upper half of a single.
    inexact = (single.view("<u4") & 0xFFFF).any() or (single != values).any()
    if inexact or (np.abs(values) < _MIN_SCALE).any():
        yield _Fault.ROUNDED


def _bits(schemes: tuple[Scheme, ...]) -> int | None:
    for scheme in schemes:
        if scheme.storage is Storage.GPTQ and scheme.bits in BITS:
            return scheme.bits
    return None


def _is_in_order(case: Case, info: TensorInfo, group_size: int) -> bool:
    done = 0
    for data in _read(case, info):
        groups = np.frombuffer(data, dtype="<i4")
        if (groups != np.arange(done, done + groups.size) // group_size).any():
            return False
        done += groups.size
    return True


_CHECKS: tuple[Check, ...] = (
    non_finite,
    scales,
    zero_points,
    group_order,
    declared_shapes,
    kept_values,
)
CHECKS: tuple[Check, ...] = (deep_findings,)
