"""The fate of every tensor, decided before any work: quantize, or keep and why.

A tensor no rule knows, or two rules claim, stops the program; so does one that the model needs
and the checkpoint lacks. That is how an MTP head cannot get lost on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nybble.arch.blocks import expected_shapes
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import PlanError
from nybble.quant.grid import IntGrid

_KEPT_DTYPES = ("BF16", "F32", "F16")


@dataclass(frozen=True)
class Quantize:
    """The tensor is the weight of a Linear that goes to an integer grid."""

    module: str
    """Name of the Linear."""
    block: int
    part: str
    grid: IntGrid


@dataclass(frozen=True)
class Keep:
    """The tensor is copied byte for byte."""

    part: str
    reason: str


Fate = Quantize | Keep


@dataclass(frozen=True)
class TensorPlan:
    """Every source tensor with its one fate, in the checkpoint's order."""

    fates: Mapping[str, Fate]
    infos: Mapping[str, TensorInfo]

    def quantized(self, block: int) -> dict[str, Quantize]:
        """The fates of one block's quantized weights, by tensor name."""
        return {name: fate for name, fate in self.all_quantized() if fate.block == block}

    def all_quantized(self) -> Iterator[tuple[str, Quantize]]:
        """Tensor name and fate of every weight to quantize."""
        for name, fate in self.fates.items():
            if isinstance(fate, Quantize):
                yield name, fate

    def kept(self) -> Iterator[tuple[str, Keep]]:
        """Tensor name and fate of everything that is copied."""
        for name, fate in self.fates.items():
            if isinstance(fate, Keep):
                yield name, fate


def plan_tensors(arch: Architecture, index: CheckpointIndex, grid: IntGrid) -> TensorPlan:
    """Decides every tensor's fate; raises PlanError for any that has none, two, or a bad shape."""
    expected = expected_shapes(arch)
    missing = [name for name in expected if name not in index]
    if missing:
        raise PlanError(f"{index.folder} lacks {_listed(missing)}, which its config.json calls for")
    fates = {name: _fate(arch, info, grid) for name, info in index.tensors.items()}
    for name, shape in expected.items():
        _check_stored(index.tensors[name], shape)
    unexpected_mtp = arch.mtp is None and [n for n in fates if n.startswith("mtp.")]
    if unexpected_mtp:
        raise PlanError(
            f"{index.folder} holds {_listed(unexpected_mtp)}, but its config.json has no "
            "mtp_num_hidden_layers: engines would not load the MTP head"
        )
    return TensorPlan(fates=fates, infos=index.tensors)


def _check_stored(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise PlanError(
            f"{info.name} in {info.file.name} has shape {list(info.shape)}; config.json calls for "
            f"{list(shape)}"
        )
    if info.dtype not in _KEPT_DTYPES:
        raise PlanError(
            f"{info.name} in {info.file.name} is stored as {info.dtype}; a base checkpoint of "
            "BF16 (or F16, F32) tensors is needed"
        )


def _fate(arch: Architecture, info: TensorInfo, grid: IntGrid) -> Fate:
    fates: list[Fate] = [
        Keep(rule.part, rule.reason)
        for rule in arch.keep_rules
        if re.fullmatch(rule.pattern, info.name)
    ]
    quantized = _quantize_fate(arch, info, grid)
    if quantized is not None:
        fates.append(quantized)
    if len(fates) != 1:
        found = "no rule knows it" if not fates else f"{len(fates)} rules claim it"
        raise PlanError(
            f"{' '.join(info.name.split())} in {info.file.name} has no single fate: {found}"
        )
    return fates[0]


def _quantize_fate(arch: Architecture, info: TensorInfo, grid: IntGrid) -> Quantize | None:
    match = re.fullmatch(re.escape(arch.blocks_prefix) + r"\.(\d+)\.(.+)\.weight", info.name)
    if not match or int(match[1]) >= arch.num_blocks:
        return None
    for group in arch.input_groups:
        if match[2] in group.members:
            _check_packable(info, grid)
            module = info.name.removesuffix(".weight")
            return Quantize(module, int(match[1]), group.part, grid)
    return None


def _check_packable(info: TensorInfo, grid: IntGrid) -> None:
    if len(info.shape) != 2:
        raise PlanError(f"{info.name} has shape {list(info.shape)}; a matrix was expected")
    outs, ins = info.shape
    group_size = ins if grid.group_size == -1 else grid.group_size
    if ins % group_size or ins % 32 or outs % 32:
        raise PlanError(
            f"{info.name} has {outs} x {ins} weights: inputs must be a multiple of the group size "
            f"({group_size}) and both of 32; choose another group_size"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
