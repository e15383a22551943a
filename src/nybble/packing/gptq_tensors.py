"""The tensors of GPTQ v1, which the ``gptq`` and ``auto_round`` formats share.

On disk, for a weight [N, K] in groups of g (G = K / g) of b bits:
``qweight`` int32 [K * b / 32, N], ``scales`` float16 [G, N], ``qzeros`` int32 [G, N * b / 32].
Codes are stored as ``q + 2^(b-1)``, lowest bits first along K. ``qzeros`` holds the zero point
2^(b-1) minus one: vLLM ignores it for symmetric weights, Transformers adds the one back, so a
wrong value would show in one engine only. The ``gptq`` format adds ``g_idx`` int32 [K], the group
of each input, here always k // g.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.packing.bits import (
    PACKABLE_BITS,
    pack_codes,
    pack_words,
    unpack_codes,
    unpack_words,
)
from nybble.packing.format import exact_scales
from nybble.quant.grid import IntGrid, QuantizedWeight

BITS = PACKABLE_BITS
SUFFIXES = ("qweight", "qzeros", "scales")
GROUP_INDEX = "g_idx"


def packed_specs(module: str, shape: tuple[int, int], grid: IntGrid) -> list[TensorSpec]:
    """Names, types and shapes of a module's stored tensors; shape is [N, K]."""
    outs, ins = shape
    groups = grid.num_groups(ins)
    return [
        TensorSpec(f"{module}.qweight", torch.int32, (ins * grid.bits // 32, outs)),
        TensorSpec(f"{module}.qzeros", torch.int32, (groups, outs * grid.bits // 32)),
        TensorSpec(f"{module}.scales", torch.float16, (groups, outs)),
    ]


def pack(module: str, quantized: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The stored tensors of one module; raises CheckpointError for scales FP16 cannot hold."""
    grid = quantized.grid
    offset = -grid.lowest
    words = pack_codes(quantized.codes, grid.bits)
    scales = exact_scales(module, quantized.scales, torch.float16)
    zeros = torch.full(scales.T.shape, offset - 1, dtype=torch.int32, device=words.device)
    return {
        f"{module}.qweight": words.T.contiguous(),
        f"{module}.qzeros": pack_words(zeros, grid.bits),
        f"{module}.scales": scales.T.contiguous(),
    }


def unpack(module: str, tensors: Mapping[str, torch.Tensor], grid: IntGrid) -> QuantizedWeight:
    """The inverse of ``pack``.

    Raises CheckpointError if the zero points are not symmetric, or the inputs' groups not k // g.
    """
    offset = -grid.lowest
    zeros = unpack_words(tensors[f"{module}.qzeros"], grid.bits)
    wrong = zeros[zeros != offset - 1]
    if len(wrong):
        raise CheckpointError(
            f"{module}.qzeros holds {int(wrong[0])} where symmetric weights of this "
            f"format hold {offset - 1}"
        )
    codes = unpack_codes(tensors[f"{module}.qweight"].T.contiguous(), grid.bits)
    if f"{module}.g_idx" in tensors:
        _check_in_order(module, tensors[f"{module}.g_idx"], codes.shape[1], grid)
    scales = tensors[f"{module}.scales"].T.contiguous().float()
    return QuantizedWeight(codes, scales, grid)


def some_outputs(
    module: str, tensors: Mapping[str, torch.Tensor], outputs: slice
) -> dict[str, torch.Tensor]:
    """The tensors of a module with some of its outputs alone."""
    qweight, qzeros, scales = (f"{module}.{suffix}" for suffix in SUFFIXES)
    outs, words = tensors[scales].shape[1], tensors[qzeros].shape[1]
    in_words = slice(outputs.start * words // outs, outputs.stop * words // outs)
    return {
        **tensors,  # g_idx is of the inputs
        qweight: tensors[qweight][:, outputs],
        qzeros: tensors[qzeros][:, in_words],
        scales: tensors[scales][:, outputs],
    }


def group_index(ins: int, grid: IntGrid) -> torch.Tensor:
    """int32 [K]: the group of each input, as neighbours stand."""
    group_size = ins if grid.group_size == -1 else grid.group_size
    return torch.arange(ins, dtype=torch.int32) // group_size


def _check_in_order(module: str, groups_I: torch.Tensor, ins: int, grid: IntGrid) -> None:
    in_order = group_index(ins, grid)
    if groups_I.shape != in_order.shape or not bool((groups_I.cpu() == in_order).all()):
        raise CheckpointError(
            f"{module}.g_idx sorts inputs into groups by activation: only groups of neighbours, "
            "desc_act false, are read"
        )
