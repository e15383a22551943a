"""How each Linear of a checkpoint is stored, by the names, types and shapes in the headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nybble.checkpoint.headers import TensorInfo
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.built import DENSE, Scheme, Storage
from nybble.doctor.snapshot import Snapshot

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
"""Types that hold a weight as it is."""
FLOATS8 = frozenset({"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"})

_WORD = 32
"""Bits of what packed tensors are made of."""
_BITS = (4, 8, 2, 3)
_DERIVED_AS_DENSE = frozenset({"F16", "BF16", "F32"})


@dataclass(frozen=True)
class Stored:
    """One Linear's tensors."""

    schemes: tuple[Scheme, ...]
    """Every way in which its weights are there: none, one, or (a mistake) dense and packed."""
    tensors: Mapping[str, TensorInfo]
    """By what follows the Linear's name: 'weight', 'qweight', 'g_idx', 'bias'. Of an expert that
    is held in a stack, the stack under 'weight'."""

    @property
    def scheme(self) -> Scheme | None:
        """The one scheme; None if there is none or more than one."""
        return self.schemes[0] if len(self.schemes) == 1 else None


NOTHING = Stored((), {})
"""A Linear without a tensor."""


def stored_linears(layout: Layout, tensors: Mapping[str, TensorInfo]) -> dict[str, Stored]:
    """How every Linear of the layout is stored, those without a tensor included."""
    found: dict[str, dict[str, TensorInfo]] = {name: {} for name in layout.linears}
    for name, info in tensors.items():
        owner, suffix = _split(name, found)
        if owner is not None:
            found[owner][suffix] = info
        for member in layout.stacks.get(name, ()):
            if member in found:
                found[member].setdefault("weight", info)
    known: dict[object, tuple[Scheme, ...]] = {}
    return {
        name: _stored(layout.linears[name].shape, members, known) if members else NOTHING
        for name, members in found.items()
    }


def packed_names(snapshot: Snapshot) -> frozenset[str]:
    """Modules from whose tensors vLLM derives what a GPTQ checkpoint quantizes.

    It reads the headers of every ``*.safetensors`` of a folder, whether the index lists it or not,
    and takes each module with a tensor in another type than F16, BF16 or F32 (vLLM 0.32,
    auto_gptq.py ``maybe_update_config``; 0.19, gptq_marlin.py).
    """
    return frozenset(
        name.rpartition(".")[0]
        for header in snapshot.headers.values()
        for name, info in header.items()
        if info.dtype not in _DERIVED_AS_DENSE
    )


def _split(name: str, linears: Mapping[str, object]) -> tuple[str | None, str]:
    """The Linear that a tensor belongs to, and the rest of its name."""
    owner, _, suffix = name.rpartition(".")
    if owner in linears:
        return owner, suffix
    # bitsandbytes writes its state behind the weight: 'X.weight.absmax'.
    owner, found, state = name.rpartition(".weight.")
    return (owner, f"weight.{state}") if found and owner in linears else (None, "")


def _stored(
    shape: tuple[int, int],
    members: Mapping[str, TensorInfo],
    known: dict[object, tuple[Scheme, ...]],
) -> Stored:
    # Many Linears, all experts of a mixture for one, are stored alike.
    key = (shape, tuple([(suffix, info.dtype, info.shape) for suffix, info in members.items()]))
    if key not in known:
        known[key] = tuple(dict.fromkeys(_schemes(shape, members)))
    return Stored(known[key], members)


def _schemes(shape: tuple[int, int], members: Mapping[str, TensorInfo]) -> Iterator[Scheme]:
    if "qweight" in members:
        yield _qweight(shape, members)
    if "weight_packed" in members:
        yield _weight_packed(shape, members)
    if "weight" in members:
        scheme = _weight(members)
        if scheme is not None:
            yield scheme


def _qweight(shape: tuple[int, int], members: Mapping[str, TensorInfo]) -> Scheme:
    outs, ins = shape
    stored = members["qweight"].shape
    groups = _group_size(ins, members.get("scales"), axis=0)
    if len(stored) == 2 and stored[0] == ins and stored[1] < outs:
        return Scheme(Storage.AWQ, _bits(stored[1], outs), groups)
    rows = stored[0] if len(stored) == 2 and stored[1] == outs else None
    return Scheme(Storage.GPTQ, _bits(rows, ins), groups)


def _weight_packed(shape: tuple[int, int], members: Mapping[str, TensorInfo]) -> Scheme:
    outs, ins = shape
    packed = members["weight_packed"]
    if packed.dtype == "U8":
        return Scheme(Storage.FP4)
    words = packed.shape[1] if len(packed.shape) == 2 and packed.shape[0] == outs else None
    return Scheme(
        Storage.PACKED,
        _bits(words, ins),
        _group_size(ins, members.get("weight_scale"), axis=1),
        # Without its zero points a weight is symmetric, or broken: completeness is another matter.
        None if "weight_zero_point" not in members else False,
    )


def _weight(members: Mapping[str, TensorInfo]) -> Scheme | None:
    dtype = members["weight"].dtype
    if dtype in FLOATS:
        return DENSE
    if dtype in FLOATS8:
        return Scheme(Storage.FP8, 8)
    if "SCB" in members or any(suffix.startswith("weight.") for suffix in members):
        return Scheme(Storage.BNB)
    if dtype == "I8":
        return Scheme(Storage.INT8, 8)
    return Scheme(Storage.FP4) if dtype == "U8" else None


def _bits(words: int | None, numbers: int) -> int | None:
    """Bits per number, if so many words of 32 bits hold a row of them."""
    found = (bits for bits in _BITS if words is not None and words == -(-numbers * bits // _WORD))
    return next(found, None)


def _group_size(ins: int, scales: TensorInfo | None, axis: int) -> int | None:
    if scales is None or len(scales.shape) != 2:
        return None
    groups = scales.shape[axis]
    if groups == 1:
        return -1
    return ins // groups if groups and ins % groups == 0 else None
