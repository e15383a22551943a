"""What a run will need, before it starts: bytes by arithmetic, time by a trial on real blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.arch.blocks import BlockRunner
from nybble.arch.plan import Quantize, TensorPlan
from nybble.arch.spec import Architecture
from nybble.checkpoint.reader import CheckpointReader
from nybble.engine.device import compute_dtype, resolve_device
from nybble.packing.formats import FORMATS
from nybble.pipeline.algorithms import quantize_block
from nybble.pipeline.assemble import block_parameters, load_block
from nybble.pipeline.block import Block, Calibrated
from nybble.pipeline.quantize import output_specs, planned
from nybble.pipeline.streams import Streams
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Gptq, Recipe, SignRound

_PROBE_TOKENS = 256
_AFFORDABLE_SECONDS = 5.0
"""A trial of a whole batch is made where a step of it is expected to take less."""


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds a run is expected to take."""

    arch: Architecture
    plan: TensorPlan
    base_bytes: int
    output_bytes: int
    block_bytes: int
    """The weights of the largest block (or the output head) and what quantizing them takes."""
    stream_bytes: int
    """The activation streams, on the host."""
    seconds: float


def inspect_checkpoint(model: Path, recipe: Recipe) -> tuple[Architecture, TensorPlan]:
    """The architecture and the fate of every tensor, from headers alone."""
    with CheckpointReader(model) as reader:
        return planned(reader, recipe)


def output_bytes(plan: TensorPlan, recipe: Recipe) -> int:
    """Size of all tensors of the result."""
    return sum(spec.nbytes for spec in output_specs(plan, FORMATS[recipe.format]))


def estimate(model: Path, recipe: Recipe, device: str) -> Estimate:
    """Plans the run and times a few steps on the first block of each kind; writes nothing."""
    where = resolve_device(device)
    with CheckpointReader(model) as reader:
        arch, plan = planned(reader, recipe)
        kinds = _blocks_by_kind(arch, plan)
        seconds = sum(
            len(blocks) * _block_seconds(reader, arch, plan, recipe, where, blocks[0])
            for blocks in kinds
        )
    dtype_bytes = compute_dtype(where).itemsize
    tokens = recipe.calibration.rows * recipe.calibration.seqlen if recipe.needs_text else 0
    streams = 2 if recipe.trains else 1
    return Estimate(
        arch=arch,
        plan=plan,
        base_bytes=sum(info.nbytes for info in plan.infos.values()),
        output_bytes=output_bytes(plan, recipe),
        block_bytes=max(
            _head_bytes(plan, arch, recipe),
            *(_block_bytes(plan, arch, recipe, blocks[0], dtype_bytes) for blocks in kinds),
        ),
        stream_bytes=streams * tokens * arch.text_config.hidden_size * dtype_bytes,
        seconds=seconds,
    )


def _blocks_by_kind(arch: Architecture, plan: TensorPlan) -> list[list[int]]:
    """Numbers of the blocks to quantize, those of the same tensors and grids together."""
    kinds: dict[frozenset[tuple[str, IntGrid | None]], list[int]] = {}
    blocks = arch.num_blocks + bool(plan.quantized(arch.num_blocks))
    for index in range(blocks):
        prefix = arch.block_prefix(index)
        kind = frozenset(
            (name.removeprefix(prefix), fate.grid if isinstance(fate, Quantize) else None)
            for name, fate in plan.fates.items()
            if name.startswith(prefix)
        )
        kinds.setdefault(kind, []).append(index)
    return list(kinds.values())


def _block_bytes(
    plan: TensorPlan, arch: Architecture, recipe: Recipe, index: int, dtype_bytes: int
) -> int:
    parameters = block_parameters(arch, plan, index)
    infos = [plan.infos[name] for parameter in parameters for name in plan.sources[parameter]]
    weights = sum(info.nbytes for info in infos)
    chosen = [plan.infos[name] for name in plan.quantized(index)]
    trained = [info.numel for info in chosen]
    if not chosen and recipe.needs_text:  # rows pass it all the same
        return weights + dtype_bytes * sum(info.numel for info in infos)
    if isinstance(recipe.algorithm, Gptq):
        # In the compute dtype, and float32 [I, I] for each input (of each expert): its moments,
        # and while one is factorized its second moment and two more.
        experts = arch.experts.count if arch.experts else 1
        inputs = {
            (fate.part == "experts", plan.infos[name].shape[-1])
            for name, fate in plan.quantized(index).items()
        }
        squares = sum((experts if routed else 1) * width**2 for routed, width in inputs)
        squares += 3 * max(width for _, width in inputs) ** 2
        return weights + dtype_bytes * sum(info.numel for info in infos) + 4 * squares
    if not recipe.trains:
        return weights + dtype_bytes * sum(trained)
    # Per weight: V (float32), the fake-quantized copy, its gradient in turn, best codes (int8);
    # and float32 temporaries of the largest weight in the backward of the rounding.
    return weights + (4 + dtype_bytes + 1) * sum(trained) + 5 * 4 * max(trained)


def _head_bytes(plan: TensorPlan, arch: Architecture, recipe: Recipe) -> int:
    """Of a quantized output head: the weight, its codes, the packed words; GPTQ's squares."""
    fate, info = plan.fates[arch.lm_head], plan.infos[arch.lm_head]
    if not isinstance(fate, Quantize):
        return 0
    squares = 4 * info.shape[-1] ** 2 if isinstance(recipe.algorithm, Gptq) else 0
    return info.nbytes + info.numel + info.numel * fate.grid.bits // 8 + 4 * squares


def _block_seconds(
    reader: CheckpointReader,
    arch: Architecture,
    plan: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    index: int,
) -> float:
    block = load_block(reader, arch, plan, index, device)
    if not recipe.needs_text:
        return _seconds(lambda: quantize_block(block, recipe, None, lambda *_: None))
    algorithm, text = recipe.algorithm, recipe.calibration
    batch = min(algorithm.batch_size if isinstance(algorithm, SignRound) else 8, text.rows)
    probe = min(text.seqlen, _PROBE_TOKENS)
    step, rest = _trial(arch, block, recipe, device, (1, probe))
    scale = batch * text.seqlen / probe
    if (step + rest) * scale < _AFFORDABLE_SECONDS:
        step, rest = _trial(arch, block, recipe, device, (batch, text.seqlen))
        scale = 1.0
    steps = algorithm.iters if isinstance(algorithm, SignRound) else 0
    return scale * (step * steps + rest * text.rows / batch)


def _trial(
    arch: Architecture, block: Block, recipe: Recipe, device: torch.device, shape: tuple[int, int]
) -> tuple[float, float]:
    """Seconds of one training step, and of all passes without training, on random rows."""
    dtype = compute_dtype(device)
    # The MTP layer takes rows that are one token shorter.
    is_mtp = block.index == arch.num_blocks
    runner = BlockRunner(arch, shape[1] + is_mtp, device, dtype)

    def run(iters: int) -> float:
        hidden = torch.randn(*shape, arch.text_config.hidden_size, dtype=dtype)
        base = hidden.clone() if recipe.trains else None
        calibrated = Calibrated(runner, Streams(hidden, base, None, device), dtype)
        shorter = recipe
        if recipe.trains:
            changed = recipe.algorithm.model_copy(update={"iters": iters})
            shorter = recipe.model_copy(update={"algorithm": changed})
        return _seconds(lambda: quantize_block(block, shorter, calibrated, lambda *_: None))

    run(1)  # warms up caches and kernels
    once = run(1)
    if not recipe.trains:
        return 0.0, once
    step = max(run(3) - once, 0.0) / 2
    return step, max(once - step, 0.0)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
