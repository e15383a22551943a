"""What a checkpoint format is to the rest of the program: functions over tensors and configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nybble.checkpoint.writer import TensorSpec
from nybble.core.errors import CheckpointError
from nybble.quant.grid import IntGrid, QuantizedWeight

Block = Mapping[str, Any]
"""config.json's ``quantization_config``."""

LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Declaration:
    """What a configuration block has to say of a checkpoint, whatever its format.

    Linears are called by their names in the checkpoint, without ``.weight``.
    """

    default: IntGrid
    """The grid that most of the decoder blocks' Linears have."""
    grids: Mapping[str, IntGrid]
    """Every quantized Linear; also of the MTP layer, single experts and ``lm_head``."""
    dense: tuple[str, ...]
    """Every other Linear of the text model, its head and the MTP head."""
    fused: Mapping[str, tuple[str, ...]]
    """What engines call a module they fuse -> its members; names relative to their block."""
    block_lists: tuple[str, ...]
    """Names of the lists of blocks with quantized Linears: the decoder's first, then perhaps the
    MTP head's."""
    towers: tuple[str, ...]
    """Regular expressions of one component each, of names outside the text model and the MTP
    head; nothing there is quantized."""


@dataclass(frozen=True)
class Format:
    """One way to store quantized Linears and to declare them."""

    name: str
    bits: tuple[int, ...]
    """Widths it holds."""
    suffixes: tuple[str, ...]
    """Of the names of a module's stored tensors, the codes' first."""
    idle_suffixes: tuple[str, ...]
    """Of tensors that others may add; ``unpack`` is to see them and checks that they do nothing."""
    dense_experts_apart: bool
    """Whether loaders look for experts that stay dense one by one, though the model has stacks."""
    packed_specs: Callable[[str, tuple[int, int], IntGrid], list[TensorSpec]]
    """(module, (N, K), grid) -> names, types and shapes of its stored tensors."""
    pack: Callable[[str, QuantizedWeight], dict[str, torch.Tensor]]
    """(module, weight) -> its tensors; raises CheckpointError for scales they cannot hold."""
    unpack: Callable[[str, Mapping[str, torch.Tensor], IntGrid], QuantizedWeight]
    """The inverse; raises CheckpointError for tensors that do not mean a symmetric weight."""
    some_outputs: Callable[[str, Mapping[str, torch.Tensor], slice], dict[str, torch.Tensor]]
    """(module, its tensors, outputs) -> tensors of these outputs alone; both ends of the slice are
    multiples of 32, or N."""
    quantization_config: Callable[[Declaration], dict[str, Any]]
    """The block for config.json; raises CheckpointError for what ``refusals`` lists."""
    refusals: Callable[[Declaration], list[str]]
    """Why engines would not read such a checkpoint, one line each; empty: they do."""
    declared_grid: Callable[[Block, str], IntGrid | None]
    """(block, module) -> what engines build a Linear as; None: unquantized. Raises CheckpointError
    for a block we cannot read."""
    sidecars: Callable[[Block], dict[str, bytes]]
    """Further files that carry the block, by name."""


def declared(bits: object, group_size: object) -> IntGrid:
    """The grid of values found in a block; raises CheckpointError for any that are none."""
    if type(bits) is not int or not 2 <= bits <= 8:
        raise CheckpointError(f"quantization_config declares {bits!r} bits: 2 to 8 are known")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise CheckpointError(f"quantization_config declares group_size {group_size!r}")
    return IntGrid(bits, group_size, signed_scales=True)


def no_sidecars(_block: Block) -> dict[str, bytes]:
    """For formats whose block stands in config.json alone."""
    return {}


def exact_scales(module: str, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [O, G] in the type a format stores; raises CheckpointError if one would change."""
    stored = scales_OG.to(dtype)
    wrong = scales_OG[stored.float() != scales_OG]
    if len(wrong):
        raise CheckpointError(
            f"{module} has a scale of {float(wrong[0])!r}, which {dtype} cannot hold: the format "
            "would change the weights"
        )
    return stored
