"""What a run will need, before it starts: bytes by arithmetic, time by a trial on real blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.arch.blocks import BlockRunner
from nybble.arch.plan import TensorPlan
from nybble.arch.spec import Architecture
from nybble.checkpoint.reader import CheckpointReader
from nybble.pipeline.block import Block, Calibrated, quantize_block, quantize_block_data_free
from nybble.pipeline.device import compute_dtype, resolve_device
from nybble.pipeline.quantize import needs_text, output_specs, planned
from nybble.pipeline.streams import Streams
from nybble.recipe.schema import Recipe, SignRound

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
    """The largest block's weights and all that is trained with them."""
    stream_bytes: int
    """Both activation streams, on the host."""
    seconds: float


def inspect_checkpoint(model: Path, recipe: Recipe) -> tuple[Architecture, TensorPlan]:
    """The architecture and the fate of every tensor, from headers alone."""
    with CheckpointReader(model) as reader:
        return planned(reader, recipe)


def output_bytes(plan: TensorPlan) -> int:
    """Size of all tensors of the result."""
    return sum(spec.nbytes for spec in output_specs(plan))


def estimate(model: Path, recipe: Recipe, device: str) -> Estimate:
    """Plans the run and times a few steps on the first block of each kind; writes nothing."""
    where = resolve_device(device)
    with CheckpointReader(model) as reader:
        arch, plan = planned(reader, recipe)
        kinds = _blocks_by_kind(arch, plan)
        seconds = sum(
            len(blocks) * _block_seconds(reader, arch, plan, recipe, where, blocks[0])
            for blocks in kinds.values()
        )
    dtype_bytes = compute_dtype(where).itemsize
    rows = recipe.calibration.rows * recipe.calibration.seqlen if needs_text(recipe) else 0
    return Estimate(
        arch=arch,
        plan=plan,
        base_bytes=sum(info.nbytes for info in plan.infos.values()),
        output_bytes=output_bytes(plan),
        block_bytes=max(
            _block_bytes(plan, arch, recipe, blocks[0], dtype_bytes) for blocks in kinds.values()
        ),
        stream_bytes=2 * rows * arch.text_config.hidden_size * dtype_bytes,
        seconds=seconds,
    )


def _blocks_by_kind(arch: Architecture, plan: TensorPlan) -> dict[frozenset[str], list[int]]:
    """Block numbers, grouped by the names of the block's tensors."""
    kinds: dict[frozenset[str], list[int]] = {}
    for index in range(arch.num_blocks):
        prefix = arch.block_prefix(index)
        names = (n.removeprefix(prefix) for n in plan.infos if n.startswith(prefix))
        kinds.setdefault(frozenset(names), []).append(index)
    return kinds


def _block_bytes(
    plan: TensorPlan, arch: Architecture, recipe: Recipe, index: int, dtype_bytes: int
) -> int:
    prefix = arch.block_prefix(index)
    infos = [info for name, info in plan.infos.items() if name.startswith(prefix)]
    weights = sum(info.nbytes for info in infos)
    trained = [plan.infos[name].numel for name in plan.quantized(index)]
    if not isinstance(recipe.algorithm, SignRound):
        return weights + dtype_bytes * sum(trained)
    # Per weight: V (float32), the fake-quantized copy, its gradient in turn, best codes (int8);
    # and float32 temporaries of the largest weight in the backward of the rounding.
    return weights + (4 + dtype_bytes + 1) * sum(trained) + 5 * 4 * max(trained)


def _block_seconds(
    reader: CheckpointReader,
    arch: Architecture,
    plan: TensorPlan,
    recipe: Recipe,
    device: torch.device,
    index: int,
) -> float:
    prefix = arch.block_prefix(index)
    weights = {name: t.to(device) for name, t in reader.read_prefix(prefix).items()}
    fates = {name.removeprefix(prefix): fate for name, fate in plan.quantized(index).items()}
    block = Block(index, weights, fates)
    if not needs_text(recipe):
        return _seconds(lambda: quantize_block_data_free(block, recipe))
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
    runner = BlockRunner(arch, shape[1], device, dtype)

    def run(iters: int) -> float:
        hidden = torch.randn(*shape, arch.text_config.hidden_size, dtype=dtype)
        calibrated = Calibrated(runner, Streams.begin(hidden, device), dtype)
        shorter = recipe
        if isinstance(recipe.algorithm, SignRound):
            changed = recipe.algorithm.model_copy(update={"iters": iters})
            shorter = recipe.model_copy(update={"algorithm": changed})
        return _seconds(lambda: quantize_block(block, shorter, calibrated, lambda *_: None))

    run(1)  # warms up caches and kernels
    once = run(1)
    if not isinstance(recipe.algorithm, SignRound):
        return 0.0, once
    step = max(run(3) - once, 0.0) / 2
    return step, max(once - step, 0.0)


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began
