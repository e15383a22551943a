"""What a checkpoint's Linears are stored as, against what its config.json declares.

Engines build a module from the declaration and then look for its tensors. Where the two disagree
some of them load garbage without a word (an MTP head then accepts 0 % of its drafts), so nothing
of ours reads or publishes such a checkpoint. Headers only; no weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TORCH_DTYPES, TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import CheckpointError
from nybble.packing import auto_round
from nybble.quant.grid import IntGrid


def stored_grids(
    arch: Architecture, index: CheckpointIndex, config: Mapping[str, Any]
) -> dict[str, IntGrid | None]:
    """The grid each expected ``*.weight`` is stored on; None: dense.

    Raises CheckpointError if a tensor is missing, has another shape, or is stored otherwise than
    config.json declares.
    """
    quantization = config.get("quantization_config")
    grids: dict[str, IntGrid | None] = {}
    for name, shape in expected_shapes(arch).items():
        module = name.removesuffix(".weight")
        packed = f"{module}.qweight" in index
        is_matrix = len(shape) == 2 and name not in (arch.embedding, arch.lm_head)
        declared = None
        if quantization is not None and is_matrix:
            declared = auto_round.declared_grid(quantization, module)
        if not packed:
            _check_dense(index, name, shape, declared)
        elif declared is None:
            raise CheckpointError(
                f"{module} is stored quantized but config.json declares it dense: engines would "
                "build it dense and not find its weight"
            )
        else:
            _check_packed(index, module, (shape[0], shape[1]), declared)
        grids[name] = declared
    return grids


def _check_dense(
    index: CheckpointIndex, name: str, shape: tuple[int, ...], declared: IntGrid | None
) -> None:
    if name not in index:
        raise CheckpointError(
            f"{index.folder} lacks {name}: engines would leave it uninitialised without a word"
        )
    if declared is not None:
        raise CheckpointError(
            f"{name} is stored dense but config.json declares it {declared.bits}-bit: engines "
            "would build it quantized and leave it uninitialised"
        )
    _check_shape(index.tensors[name], shape)


def _check_packed(
    index: CheckpointIndex, module: str, shape: tuple[int, int], grid: IntGrid
) -> None:
    if f"{module}.weight" in index:
        raise CheckpointError(f"{module} is stored twice: quantized, and dense as .weight")
    for spec in auto_round.packed_specs(module, shape, grid):
        if spec.name not in index:
            raise CheckpointError(f"{index.folder} lacks {spec.name}, though {module} is quantized")
        info = index.tensors[spec.name]
        _check_shape(info, spec.shape)
        if TORCH_DTYPES[info.dtype] != spec.dtype:
            raise CheckpointError(f"{spec.name} is stored as {info.dtype}, not {spec.dtype}")


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name} in {info.file.name} has shape {list(info.shape)}; config.json calls for "
            f"{list(shape)}"
        )
