"""A checkpoint's tensors as the parameters of one block."""

from __future__ import annotations

import torch

from nybble.arch.grids import linear_groups
from nybble.arch.plan import Quantize, TensorPlan
from nybble.arch.spec import Architecture
from nybble.checkpoint.reader import CheckpointReader
from nybble.pipeline.block import Block, Target


def block_parameters(arch: Architecture, plan: TensorPlan, index: int) -> list[str]:
    """Full names of a block's parameters; the MTP layer is the block after the last."""
    prefix = arch.block_prefix(index)
    return [name for name in plan.sources if name.startswith(prefix)]


def load_block(
    reader: CheckpointReader,
    arch: Architecture,
    plan: TensorPlan,
    index: int,
    device: torch.device,
) -> Block:
    """Reads a block's parameters; stacks of experts are put together from what is stored."""
    prefix = arch.block_prefix(index)
    names = block_parameters(arch, plan, index)
    weights = {name.removeprefix(prefix): _parameter(reader, arch, plan, name) for name in names}
    targets = {
        name.removeprefix(prefix): target
        for name in names
        if (target := target_of(plan, name)) is not None
    }
    inputs = [
        tuple(name.removeprefix(prefix) for name in together)
        for group in linear_groups(arch, plan.sources)
        if group.block == index
        for together in group.inputs
    ]
    return Block(
        index=index,
        weights={name: weight.to(device) for name, weight in weights.items()},
        targets=targets,
        inputs=tuple(together for together in inputs if together[0] in targets),
    )


def target_of(plan: TensorPlan, parameter: str) -> Target | None:
    """What is to become of a parameter; None: it is kept."""
    fates = [plan.fates[name] for name in plan.sources[parameter]]
    quantized = [fate for fate in fates if isinstance(fate, Quantize)]
    if not quantized:
        return None
    modules = tuple(module for fate in quantized for module in fate.modules)
    return Target(modules, quantized[0].grid, quantized[0].part)


def _parameter(
    reader: CheckpointReader, arch: Architecture, plan: TensorPlan, name: str
) -> torch.Tensor:
    sources = plan.sources[name]
    if sources == (name,):
        return reader.read(name)
    assert arch.experts is not None
    rows = torch.cat([reader.view(source) for source in sources])
    return rows.view(arch.experts.count, -1, rows.shape[-1])
