"""Quantizes the linears of one decoder block and moves the calibration rows past it."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

import torch

from nybble.arch.blocks import BlockRunner
from nybble.arch.plan import Quantize
from nybble.pipeline.quant_log import QuantLogRow
from nybble.pipeline.streams import Streams
from nybble.quant.grid import QuantizedWeight
from nybble.quant.metrics import relative_output_error, sqnr_db
from nybble.quant.rtn import rtn
from nybble.quant.scale_search import initial_scales
from nybble.quant.signround import SignRoundResult, SignRoundSettings, signround
from nybble.recipe.schema import Recipe, SignRound

Weights = Mapping[str, torch.Tensor]
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Block:
    """One block to quantize. Tensor names are relative to the block."""

    index: int
    weights: Weights
    """All of its tensors, on the compute device, in the base's dtype."""
    fates: Mapping[str, Quantize]
    """Those of them to quantize."""

    def cast(self, dtype: torch.dtype, skip: Container[str] = ()) -> dict[str, torch.Tensor]:
        """The weights in another dtype, but for those named in ``skip``."""
        return {name: w.to(dtype) for name, w in self.weights.items() if name not in skip}


@dataclass(frozen=True)
class Calibrated:
    """The calibration rows and what runs a block on them."""

    runner: BlockRunner
    streams: Streams
    dtype: torch.dtype
    """Of the arithmetic."""


@dataclass(frozen=True)
class BlockResult:
    """Quantized weights by module name, and their log rows."""

    quantized: dict[str, QuantizedWeight]
    log: list[QuantLogRow]


def quantize_block_data_free(block: Block, recipe: Recipe) -> BlockResult:
    """Rounds to nearest without looking at any text."""
    began = time.monotonic()
    method = recipe.algorithm.scale_init
    quantized = {n: rtn(block.weights[n], fate.grid, method) for n, fate in block.fates.items()}
    return _result(block, recipe, quantized, time.monotonic() - began)


def quantize_block(
    block: Block, recipe: Recipe, calibrated: Calibrated, on_step: OnStep
) -> BlockResult:
    """Quantizes by the recipe's algorithm; both streams are past the block afterwards.

    Raises QuantizationError for values that are not finite.
    """
    began = time.monotonic()
    runner, streams, dtype = calibrated.runner, calibrated.streams, calibrated.dtype
    importance = _advance_base(block, calibrated)
    trained = None
    if isinstance(recipe.algorithm, SignRound):
        trained = _train(block, recipe, calibrated, importance, on_step)
        quantized = trained.quantized
    else:
        method = recipe.algorithm.scale_init
        quantized = {
            name: rtn(block.weights[name], fate.grid, method, importance[name])
            for name, fate in block.fates.items()
        }
    finished = block.cast(dtype, skip=block.fates)
    finished |= {name: q.dequantize().to(dtype) for name, q in quantized.items()}
    loss = streams.advance_quantized(lambda rows: runner(block.index, finished, rows))
    seconds = time.monotonic() - began
    return _result(block, recipe, quantized, seconds, importance, loss, trained)


def _advance_base(block: Block, calibrated: Calibrated) -> dict[str, torch.Tensor]:
    """Moves the base stream on; returns the mean square of each linear's input channels."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def accumulate(module: str, inputs: torch.Tensor) -> None:
        rows = inputs.float().flatten(0, -2)
        name = f"{module}.weight"
        sums[name] = sums.get(name, 0) + rows.square().sum(dim=0)
        counts[name] = counts.get(name, 0) + len(rows)

    runner = calibrated.runner
    base = block.cast(calibrated.dtype)
    modules = [name.removesuffix(".weight") for name in block.fates]
    with runner.inputs_of(block.index, modules, accumulate):
        calibrated.streams.advance_base(lambda rows: runner(block.index, base, rows))
    return {name: total / counts[name] for name, total in sums.items()}


def _train(
    block: Block, recipe: Recipe, calibrated: Calibrated, importance: Weights, on_step: OnStep
) -> SignRoundResult:
    algorithm = recipe.algorithm
    assert isinstance(algorithm, SignRound)
    kept = block.cast(calibrated.dtype, skip=block.fates)
    grids = {name: fate.grid for name, fate in block.fates.items()}
    scales = {
        name: initial_scales(algorithm.scale_init, block.weights[name], grid, importance[name])
        for name, grid in grids.items()
    }
    lr = algorithm.lr or 1 / algorithm.iters
    return signround(
        weights={name: block.weights[name] for name in block.fates},
        initial_scales=scales,
        grids=grids,
        forward=lambda rounded, rows: calibrated.runner(block.index, {**kept, **rounded}, rows),
        batches=calibrated.streams.training_batches(
            algorithm.batch_size, recipe.calibration.seed, block.index
        ),
        settings=SignRoundSettings(algorithm.iters, lr, algorithm.minmax_lr or lr),
        compute_dtype=calibrated.dtype,
        on_step=on_step,
    )


def _result(
    block: Block,
    recipe: Recipe,
    quantized: Mapping[str, QuantizedWeight],
    seconds: float,
    importance: Weights | None = None,
    loss: float | None = None,
    trained: SignRoundResult | None = None,
) -> BlockResult:
    log = []
    for name, fate in block.fates.items():
        weight, result = block.weights[name], quantized[name]
        error = relative_output_error(weight, result, importance[name]) if importance else None
        log.append(
            QuantLogRow(
                module=fate.module,
                block=block.index,
                part=fate.part,
                out_features=weight.shape[0],
                in_features=weight.shape[1],
                bits=fate.grid.bits,
                group_size=fate.grid.group_size,
                algorithm=recipe.algorithm.name,
                relative_output_error=error,
                sqnr_db=sqnr_db(weight, result),
                block_loss_start=trained.first_loss if trained else None,
                block_loss=loss,
                best_iter=trained.best_iter if trained else None,
                block_seconds=seconds,
            )
        )
    return BlockResult({fate.module: quantized[n] for n, fate in block.fates.items()}, log)
