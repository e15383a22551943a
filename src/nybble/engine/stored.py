"""What a checkpoint's Linears are stored as, against what its config.json declares.

Engines build a module from the declaration and then look for its tensors. Where the two disagree
some of them load garbage without a word (an MTP head then accepts 0 % of its drafts), so nothing
of ours reads or publishes such a checkpoint. Headers only; no weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture
from nybble.checkpoint.dtypes import TORCH_DTYPES
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import CheckpointError
from nybble.packing.format import Format
from nybble.packing.formats import FORMATS, format_of
from nybble.quant.grid import IntGrid

_CODES = tuple(dict.fromkeys(known.suffixes[0] for known in FORMATS.values()))
"""Suffixes by which a Linear is seen to be quantized."""


def stored_grids(
    arch: Architecture, index: CheckpointIndex, config: Mapping[str, Any]
) -> dict[str, IntGrid | None]:
    """The grid that each parameter of the model is stored on, by its name; None: dense.

    Raises CheckpointError if a tensor is missing, has another shape, or is stored otherwise than
    config.json declares.
    """
    checked = _Stored(arch, index, config)
    grids: dict[str, IntGrid | None] = {}
    for parameter, shape in expected_shapes(arch).items():
        parts = stored_parts(arch, index, parameter, shape)
        (first, grid), *others = [(name, checked.grid(name, own)) for name, own in parts]
        for other, its_grid in others:
            if its_grid != grid:
                raise CheckpointError(
                    f"{first} and {other} are not on one grid, but engines fuse the experts"
                )
        grids[parameter] = grid
    return grids


def stored_parts(
    arch: Architecture, index: CheckpointIndex, parameter: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the dense tensors that make up a parameter, in the order of its rows.

    That is the parameter itself, but for a stack [E, rows, I] of experts stored one by one.
    """
    linears = arch.experts.stacked_modules(parameter) if arch.experts else ()
    if not linears or parameter in index:
        yield parameter, shape
    else:
        for linear in linears:
            yield f"{linear}.weight", (shape[0] * shape[1] // len(linears), shape[2])


class _Stored:
    """One checkpoint's headers and declaration."""

    def __init__(
        self, arch: Architecture, index: CheckpointIndex, config: Mapping[str, Any]
    ) -> None:
        self._arch = arch
        self._index = index
        self._format = format_of(config)
        self._block = config.get("quantization_config")

    def grid(self, name: str, shape: tuple[int, ...]) -> IntGrid | None:
        """The grid of one dense tensor, once stored and declared agree."""
        module = name.removesuffix(".weight")
        declared = self._declared(name, shape)
        packed = [suffix for suffix in _CODES if f"{module}.{suffix}" in self._index]
        if not packed:
            _check_dense(self._index, name, shape, declared)
        elif declared is None or self._format is None:
            raise CheckpointError(
                f"{module} is stored quantized but config.json declares it dense: engines would "
                "build it dense and not find its weight"
            )
        else:
            _check_packed(self._index, module, (shape[0], shape[1]), declared, self._format)
        return declared

    def _declared(self, name: str, shape: tuple[int, ...]) -> IntGrid | None:
        if self._format is None or self._block is None or name == self._arch.embedding:
            return None
        stacked = self._arch.experts.stacked_modules(name) if self._arch.experts else ()
        if stacked:
            return self._format.declared_grid(self._block, stacked[0])
        if len(shape) != 2 or not name.endswith(".weight"):
            return None
        return self._format.declared_grid(self._block, name.removesuffix(".weight"))


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
    index: CheckpointIndex, module: str, shape: tuple[int, int], grid: IntGrid, stored_as: Format
) -> None:
    if f"{module}.weight" in index:
        raise CheckpointError(f"{module} is stored twice: quantized, and dense as .weight")
    if grid.bits not in stored_as.bits:
        raise CheckpointError(f"{module} is declared {grid.bits}-bit: that width is not read")
    for spec in stored_as.packed_specs(module, shape, grid):
        if spec.name not in index:
            raise CheckpointError(
                f"{index.folder} lacks {spec.name}, though {module} is quantized and config.json "
                f"declares {stored_as.name}"
            )
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
