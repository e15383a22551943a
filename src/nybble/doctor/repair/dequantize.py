"""A packed MTP head as BF16 again, where no base is at hand: what its codes mean, not what it was.

Zero points are stored in one of two conventions that nothing but the values tells apart: version
1 of GPTQ stores them less one. Symmetric weights give themselves away, as every zero point is the
middle of the grid; for others the right one is that under which weights have no common offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.doctor.findings import Part
from nybble.doctor.repair.draft import (
    PACKED_SUFFIXES,
    Draft,
    Entry,
    Patient,
    computed,
    packed_names,
)
from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.stored import FLOATS, Stored
from nybble.doctor.zero_points import ZeroPoints, zero_point_convention
from nybble.packing.bits import PACKABLE_BITS, unpack_words

ACTION = "dequantize-mtp"

_NEEDED = {
    Storage.GPTQ: ("qweight", "qzeros", "scales"),
    Storage.PACKED: ("weight_packed", "weight_scale"),
}
_WORDS = frozenset({"I32"})
_TYPES = {
    "scales": FLOATS,
    "weight_scale": FLOATS,
    "g_idx": frozenset({"I32", "I64"}),
    "weight_g_idx": frozenset({"I32", "I64"}),
}


def packed_mtp(draft: Draft) -> dict[str, Stored]:
    """The MTP head's Linears that are not stored dense."""
    return {
        name: stored
        for name, stored in draft.stored().items()
        if draft.layout.linears[name].part is Part.MTP
        and stored.scheme is not None
        and stored.scheme.storage is not Storage.DENSE
    }


def dequantize_mtp(_patient: Patient, draft: Draft) -> Draft:
    """Replaces packed Linears of the MTP head by what their codes and scales mean, in BF16."""
    packed = packed_mtp(draft)
    linears = draft.layout.linears
    for name, stored in packed.items():
        if not fits(linears[name].shape, stored):
            return draft.failed(
                f"{name}: stored as {stored.scheme}, not whole or of a kind that is not "
                "de-quantized: give the base with --base"
            )
    if not packed:
        return draft
    replaced = {tensor for name in packed for tensor in packed_names(name)}
    entries = {name: entry for name, entry in draft.entries.items() if name not in replaced}
    for name, stored in packed.items():
        assert stored.scheme is not None
        parts = parts_of(draft.entries, name)
        spec = TensorSpec(f"{name}.weight", torch.bfloat16, linears[name].shape)
        file = next(iter(parts.values())).file
        entries[spec.name] = computed(spec, file, partial(_bfloat16, parts, stored.scheme))
    first = next(iter(packed))
    return draft.mended(
        ACTION,
        f"{first} and all {len(packed)} packed Linears of the MTP head: de-quantized to BF16; "
        "they stay rounded, only the base has the exact ones",
        entries=entries,
    )


def parts_of(entries: Mapping[str, Entry], linear: str) -> dict[str, Entry]:
    """A Linear's packed tensors, by what follows its name."""
    return {
        suffix: entries[f"{linear}.{suffix}"]
        for suffix in sorted(PACKED_SUFFIXES)
        if f"{linear}.{suffix}" in entries
    }


def dense_weight(parts: Mapping[str, torch.Tensor], scheme: Scheme) -> torch.Tensor:
    """What a Linear's packed tensors mean, float32 [N, K]; by the suffixes of their names."""
    assert scheme.bits is not None
    if scheme.storage is Storage.GPTQ:
        codes = unpack_words(parts["qweight"].T.contiguous(), scheme.bits)
        scales = parts["scales"].float().T
        groups = _groups(parts.get("g_idx"), codes.shape[1], scales.shape[1])
        stored = unpack_words(parts["qzeros"], scheme.bits).T
        zeros = _zero_points(parts["qzeros"], stored, codes, groups, scheme.bits)
    else:
        codes = unpack_words(parts["weight_packed"], scheme.bits)
        scales = parts["weight_scale"].float()
        groups = _groups(parts.get("weight_g_idx"), codes.shape[1], scales.shape[1])
        zeros = torch.full(scales.shape, 1 << (scheme.bits - 1))
        if "weight_zero_point" in parts:
            zeros = unpack_words(parts["weight_zero_point"].T.contiguous(), scheme.bits).T
    return (codes.float() - zeros.float()[:, groups]) * scales[:, groups]


def fits(shape: tuple[int, int], stored: Stored) -> bool:
    """Whether a packed Linear is whole: all parts, in types and shapes that fit each other."""
    scheme, tensors = stored.scheme, stored.tensors
    needed = _NEEDED.get(scheme.storage, ()) if scheme is not None else ()
    if (
        scheme is None
        or not needed
        or scheme.bits not in PACKABLE_BITS
        or scheme.group_size is None
    ):
        return False
    if not all(part in tensors for part in needed):
        return False
    outs, ins = shape
    groups = 1 if scheme.group_size == -1 else ins // scheme.group_size
    words = (ins * scheme.bits // 32, outs)
    zeros = (groups, outs * scheme.bits // 32)
    shapes = {
        "qweight": words,
        "qzeros": zeros,
        "scales": (groups, outs),
        "g_idx": (ins,),
        "weight_packed": words[::-1],
        "weight_scale": (outs, groups),
        "weight_zero_point": zeros[::-1],
        "weight_g_idx": (ins,),
    }
    return ins * scheme.bits % 32 == 0 and all(
        tensors[part].shape == own and tensors[part].dtype in _TYPES.get(part, _WORDS)
        for part, own in shapes.items()
        if part in tensors
    )


def _bfloat16(parts: Mapping[str, Entry], scheme: Scheme) -> torch.Tensor:
    tensors = {suffix: entry.read() for suffix, entry in parts.items()}
    return dense_weight(tensors, scheme).to(torch.bfloat16)


def _groups(index: torch.Tensor | None, ins: int, groups: int) -> torch.Tensor:
    """The group of each input: as the checkpoint says, else neighbours share one."""
    if index is None or bool((index < 0).any()):  # compressed-tensors' mark for "not set"
        return torch.arange(ins) // (ins // groups)
    if int(index.max()) >= groups:
        raise CheckpointError(f"g_idx names group {int(index.max())} of {groups}: it is broken")
    return index.long()


def _zero_points(
    words: torch.Tensor, stored: torch.Tensor, codes: torch.Tensor, groups: torch.Tensor, bits: int
) -> torch.Tensor:
    """Zero points [N, G] of what GPTQ's tensors hold, by either convention."""
    convention = zero_point_convention(words.numpy(), bits)
    if convention is ZeroPoints.V2:
        return stored
    less_one = (stored + 1) & ((1 << bits) - 1)  # uint8: 255 + 1 is 0 as it has to be
    if convention is ZeroPoints.V1:
        return less_one
    means = [
        (codes.float() - zeros.float()[:, groups]).mean().abs() for zeros in (less_one, stored)
    ]
    return less_one if means[0] <= means[1] else stored
