"""What a module that an engine has built expects of each of its Linears' tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.stored import FLOATS

_INTS = frozenset({"I32"})
CONVERTED = frozenset({"I64", "U32"})
"""Types that a loader turns into I32 without loss, as long as they hold packed words."""


@dataclass(frozen=True)
class Parameter:
    """One tensor that a built Linear holds."""

    shape: tuple[int, ...] | None
    """None: it is not compared."""
    dtypes: frozenset[str]
    """Types that can be copied into it without changing what they mean."""
    axes: tuple[int, int] | None = None
    """Which of its axes runs along the outputs, and which along the inputs."""
    needed: bool = True
    """Whether the engine computes with it."""


def parameters(
    scheme: Scheme, shape: tuple[int, int], *, reads_all: bool, reads_g_idx: bool
) -> Mapping[str, Parameter] | None:
    """The tensors of a Linear [N, K] by suffix; None: those of this storage are not modelled.

    Shapes: vLLM 0.32, auto_gptq.py, auto_awq.py and compressed_tensors_wNa16.py. ``reads_all``:
    the engine computes with the zero points of symmetric GPTQ weights and with packed weights'
    shapes too, as Transformers does and vLLM and SGLang do not; ``reads_g_idx``: it looks up each
    input's group.
    """
    outs, ins = shape
    if scheme.storage is Storage.DENSE:
        return {"weight": Parameter(shape, FLOATS, (0, 1))}
    if scheme.storage is Storage.GPTQ:
        words, groups = _words(ins, scheme), _groups(ins, scheme)
        return {
            "qweight": Parameter(_sizes(words, outs), _INTS, (1, 0)),
            "scales": Parameter(_sizes(groups, outs), FLOATS, (1, 0)),
            "qzeros": Parameter(_sizes(groups, _words(outs, scheme)), _INTS, (1, 0), reads_all),
            "g_idx": Parameter((ins,), _INTS, None, reads_g_idx),
        }
    if scheme.storage is Storage.AWQ:
        words, groups = _words(outs, scheme), _groups(ins, scheme)
        return {
            "qweight": Parameter(_sizes(ins, words), _INTS, (1, 0)),
            "scales": Parameter(_sizes(groups, outs), FLOATS, (1, 0)),
            "qzeros": Parameter(_sizes(groups, words), _INTS, (1, 0)),
        }
    return _packed(scheme, shape, reads_all) if scheme.storage is Storage.PACKED else None


def known_suffixes(storage: Storage) -> frozenset[str]:
    """The suffixes that belong to a storage whose parameters are not modelled."""
    return _SUFFIXES.get(storage, frozenset())


def _packed(scheme: Scheme, shape: tuple[int, int], reads_all: bool) -> Mapping[str, Parameter]:
    outs, ins = shape
    groups = _groups(ins, scheme)
    found = {
        "weight_packed": Parameter(_sizes(outs, _words(ins, scheme)), _INTS, (0, 1)),
        "weight_scale": Parameter(_sizes(outs, groups), FLOATS, (0, 1)),
        "weight_shape": Parameter((2,), _INTS | {"I64"}, None, reads_all),
    }
    if scheme.symmetric is False:
        found["weight_zero_point"] = Parameter(_sizes(_words(outs, scheme), groups), _INTS, (0, 1))
    return found


def _words(numbers: int, scheme: Scheme) -> int | None:
    return None if scheme.bits is None else ceil(numbers * scheme.bits / 32)


def _groups(ins: int, scheme: Scheme) -> int | None:
    if scheme.group_size is None:
        return None
    return 1 if scheme.group_size <= 0 else ins // scheme.group_size


def _sizes(first: int | None, second: int | None) -> tuple[int, int] | None:
    return None if first is None or second is None else (first, second)


_SCALES = frozenset({"weight_scale", "input_scale"})
_SUFFIXES: Mapping[Storage, frozenset[str]] = {
    Storage.INT8: _SCALES | {"weight", "weight_zero_point", "input_zero_point"},
    Storage.FP8: _SCALES | {"weight", "weight_scale_inv", "activation_scale"},
    Storage.FP4: _SCALES
    | {"weight", "weight_packed", "weight_scale_2", "weight_global_scale", "input_global_scale"},
    Storage.BNB: frozenset({"weight", "SCB", "weight_format"}),
}
