"""D17: what was not to be touched is there as in the base, by names, types and shapes.

The values themselves are compared by ``values``, which has to read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.case import Case, Check
from nybble.doctor.checks.common import PACKED_SUFFIXES, clean, counted, is_expected, lost
from nybble.doctor.findings import Finding, Hit, Part, Severity
from nybble.doctor.layout.spec import part_of
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.stored import FLOATS

_SUFFIX = ".weight"
_PARTS = {Part.TRUNK: "of the decoder", Part.MTP: "of the MTP head", Part.VISION: "of the vision"}
_EVIDENCE = "auto-round#1477, llm-compressor#2486: savers that drop or cast tensors"


def kept_tensors(case: Case) -> Iterator[tuple[TensorInfo, TensorInfo]]:
    """Tensors of the checkpoint that were not quantized, each with the base's of the same name."""
    if case.base is None or _is_quantized(case.base):
        return
    theirs = case.base.all_tensors()
    for name, info in case.snapshot.all_tensors().items():
        if name in theirs and info.dtype in FLOATS:
            yield info, theirs[name]


def quantized_base(case: Case) -> Iterator[Finding]:
    """A base that is no base."""
    if case.base is not None and _is_quantized(case.base):
        yield Finding(
            code="D17",
            severity=Severity.WARNING,
            where="--base",
            seen=f"{clean(case.base.source.label)} is quantized itself",
            consequence="nothing is compared with it",
            fix="give the BF16 checkpoint that this one was made from",
        )


def absent(case: Case) -> Iterator[Finding]:
    """Tensors of the base that are not here in any form."""
    if case.base is None or _is_quantized(case.base):
        return
    ours = case.snapshot.all_tensors()
    stacked = _stacked(case)
    names = [n for n in case.base.all_tensors() if not _is_here(case, n, ours, stacked)]
    for part, whose in _PARTS.items():
        missing = [name for name in names if part_of(name) is part]
        needed = [name for name in missing if is_expected(case, name)]
        if needed:
            yield _finding(
                Severity.ERROR,
                needed,
                f"{whose} are in the base and not here",
                "engines compute with random weights in their place, or stop",
                lost(case, needed, case.engines),
            )
        elif missing:
            yield _finding(
                Severity.NOTE if part is Part.TRUNK else Severity.WARNING,
                missing,
                f"{whose} are in the base and not here, nor called for by config.json",
                "the checkpoint does less than its base",
            )


def changed(case: Case) -> Iterator[Finding]:
    """Kept tensors of another shape or type than the base's."""
    reshaped: list[str] = []
    casts: dict[tuple[str, str], list[str]] = {}
    for info, original in kept_tensors(case):
        if info.shape != original.shape:
            reshaped.append(info.name)
        elif info.dtype != original.dtype and original.dtype in FLOATS:
            casts.setdefault((original.dtype, info.dtype), []).append(info.name)
    if reshaped:
        yield _finding(
            Severity.ERROR,
            reshaped,
            "are of another shape than in the base",
            "they are not the base's weights: another base, or a broken export",
        )
    for (before, after), names in casts.items():
        yield _finding(
            Severity.NOTE if after == "F32" else Severity.WARNING,
            names,
            f"are {after}, in the base {before}",
            _cast_consequence(before, after),
        )


def added(case: Case) -> Iterator[Finding]:
    """Tensors that neither the base has nor quantizing one of its Linears makes."""
    if case.base is None or _is_quantized(case.base):
        return
    theirs = case.base.all_tensors()
    known = {name.removesuffix(_SUFFIX) for name in theirs}
    if case.layout is not None:
        known.update(case.layout.stacks, case.layout.linears)
    names = [
        name
        for name in case.snapshot.all_tensors()
        if name not in theirs and known.isdisjoint((name, *_owners(name)))
    ]
    if names:
        yield _finding(
            Severity.NOTE, names, "are not in the base", "engines may refuse or skip them"
        )


def _is_quantized(snapshot: Snapshot) -> bool:
    return isinstance((snapshot.config or {}).get("quantization_config"), dict)


def _is_here(
    case: Case, name: str, ours: Mapping[str, TensorInfo], stacked: Mapping[str, str]
) -> bool:
    """Whether a tensor of the base is in the checkpoint: as it is, packed, in or out of a stack."""
    owner = name.removesuffix(_SUFFIX)
    if name in ours or any(f"{owner}{suffix}" in ours for suffix in PACKED_SUFFIXES):
        return True
    if stacked.get(owner) in ours:
        return True
    members = () if case.layout is None else case.layout.stacks.get(name, ())
    return bool(members) and all(
        any(f"{member}{suffix}" in ours for suffix in (_SUFFIX, *PACKED_SUFFIXES))
        for member in members
    )


def _stacked(case: Case) -> dict[str, str]:
    """Linear -> the stack that may hold it."""
    stacks = {} if case.layout is None else case.layout.stacks
    return {member: stack for stack, members in stacks.items() for member in members}


def _owners(name: str) -> tuple[str, str]:
    """Linears that a tensor may belong to: bitsandbytes writes 'X.weight.absmax'."""
    return name.rpartition(".")[0], name.rpartition(".weight.")[0]


def _cast_consequence(before: str, after: str) -> str:
    if after == "F32":
        return "they take more room; the values are the same"
    if after == "F16":
        return "values beyond 65504 became infinite, small ones zero"
    return f"{before} values were rounded: in A_log, decays drift apart over a long context"


def _finding(
    severity: Severity,
    names: list[str],
    seen: str,
    consequence: str,
    found: tuple[Hit, ...] = (),
) -> Finding:
    is_mtp = all(part_of(name) is Part.MTP for name in names)
    return Finding(
        code="D17",
        severity=severity,
        where=clean(names[0]),
        seen=f"{counted(names, 'tensor')}: {seen}",
        consequence=consequence,
        fix="copy them from the base, bit for bit",
        evidence=_EVIDENCE,
        hits=found,
        repair="graft-mtp" if is_mtp and severity is not Severity.NOTE else None,
    )


CHECKS: tuple[Check, ...] = (quantized_base, absent, changed, added)
