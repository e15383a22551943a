"""The recipe's algorithm applied to one block. Afterwards all streams are past the block."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from nybble.pipeline.block import (
    Block,
    Calibrated,
    ModuleFacts,
    MomentCounter,
    Moments,
    OnStep,
    Rounded,
    gather_moments,
    importances,
    pooled,
    round_data_free,
    start_scales,
)
from nybble.pipeline.quant_log import BlockLog
from nybble.quant.gptq import GptqSettings, factorize, gptq
from nybble.quant.grid import QuantizedWeight, round_to_grid
from nybble.quant.metrics import correlated_output_error, relative_output_error
from nybble.quant.moments import InputMoments
from nybble.quant.scale_search import initial_scales
from nybble.quant.signround import SignRoundResult, SignRoundSettings, signround
from nybble.recipe.schema import Gptq, Recipe, SignRound

MIN_TOKENS = 128
"""An expert that saw fewer is rounded to nearest: their second moment says little of the rest."""


def quantize_block(
    block: Block, recipe: Recipe, calibrated: Calibrated | None, on_step: OnStep
) -> tuple[dict[str, Rounded], BlockLog]:
    """Quantizes all targets of a block; ``calibrated`` is None where no text is needed.

    Raises QuantizationError for values that are not finite.
    """
    began = time.monotonic()
    algorithm = recipe.algorithm
    if calibrated is None:
        return round_data_free(block, algorithm.scale_init), BlockLog(time.monotonic() - began)
    trained = None
    if not block.targets:  # the recipe keeps all of it
        rounded: dict[str, Rounded] = {}
        if calibrated.streams.base is not None:
            calibrated.streams.advance_base(calibrated.run(block, block.cast(calibrated.dtype)))
    elif isinstance(algorithm, Gptq):
        rounded = _gptq(block, algorithm, calibrated)
    elif recipe.trains:
        rounded, trained = _signround(block, recipe, calibrated, on_step)
    else:
        moments = gather_moments(
            block, calibrated, block.cast(calibrated.dtype), _firsts(block), full=False
        )
        rounded = _rtn(block, recipe, moments)
    finished = block.cast(calibrated.dtype, skip=block.targets)
    for name, result in rounded.items():
        dense = result.weight.dequantize().to(calibrated.dtype)
        finished[name] = block.shaped(name, dense)
    loss = calibrated.streams.advance_quantized(calibrated.run(block, finished))
    return rounded, BlockLog(
        seconds=time.monotonic() - began,
        loss=loss,
        loss_start=trained.first_loss if trained else None,
        best_iter=trained.best_iter if trained else None,
    )


def _firsts(block: Block) -> tuple[str, ...]:
    """One target for each input."""
    return tuple(names[0] for names in block.inputs)


def _rtn(block: Block, recipe: Recipe, moments: Moments) -> dict[str, Rounded]:
    rounded = {}
    for names in block.inputs:
        importance = importances(moments[names[0]])
        for name in names:
            scales = start_scales(block, name, recipe.algorithm.scale_init, importance)
            weight = round_to_grid(block.matrix(name), scales, block.targets[name].grid)
            rounded[name] = diagonal_facts(block, name, weight, moments[names[0]])
    return rounded


def _signround(
    block: Block, recipe: Recipe, calibrated: Calibrated, on_step: OnStep
) -> tuple[dict[str, Rounded], SignRoundResult]:
    """Importance is measured on the base stream, which has to pass the block anyway."""
    algorithm, runner, streams = recipe.algorithm, calibrated.runner, calibrated.streams
    assert isinstance(algorithm, SignRound)
    gathered = _advance_base(block, calibrated)
    moments = {name: gathered[names[0]] for names in block.inputs for name in names}
    kept = block.cast(calibrated.dtype, skip=block.targets)
    lr = algorithm.lr or 1 / algorithm.iters
    trained = signround(
        weights={name: block.matrix(name) for name in block.targets},
        initial_scales={
            name: start_scales(block, name, algorithm.scale_init, importances(moments[name]))
            for name in block.targets
        },
        grids={name: target.grid for name, target in block.targets.items()},
        forward=lambda weights, batch: batch.real(
            runner(
                block.index,
                {**kept, **{name: block.shaped(name, w) for name, w in weights.items()}},
                batch.hidden,
            )
        ),
        batches=streams.training_batches(
            algorithm.batch_size, recipe.calibration.seed, block.index
        ),
        settings=SignRoundSettings(algorithm.iters, lr, algorithm.minmax_lr or lr),
        compute_dtype=calibrated.dtype,
        on_step=on_step,
    )
    rounded = {
        name: diagonal_facts(block, name, weight, moments[name])
        for name, weight in trained.quantized.items()
    }
    return rounded, trained


def _advance_base(block: Block, calibrated: Calibrated) -> Moments:
    """Moves the base stream on; its weights are gone before any training starts."""
    counter = MomentCounter(block, _firsts(block), False, calibrated.streams.device)
    base = calibrated.run(block, block.cast(calibrated.dtype))
    with calibrated.runner.inputs_of(block.index, _firsts(block), counter.on_input):
        calibrated.streams.advance_base(lambda batch: base(counter.watch(batch)))
    return counter.moments


def _gptq(block: Block, algorithm: Gptq, calibrated: Calibrated) -> dict[str, Rounded]:
    """All inputs are gathered in one pass, or (true_sequential) each after those before it."""
    weights = block.cast(calibrated.dtype)
    stages = [(names,) for names in block.inputs] if algorithm.true_sequential else [block.inputs]
    rounded: dict[str, Rounded] = {}
    for stage in stages:
        firsts = tuple(names[0] for names in stage)
        moments = dict(gather_moments(block, calibrated, weights, firsts, full=True))
        if stage is stages[-1]:
            weights.clear()  # nothing runs on them any more
        for names in stage:
            rounded |= gptq_group(block, names, algorithm, moments.pop(names[0]))
            for name in names if weights else ():
                dense = rounded[name].weight.dequantize().to(calibrated.dtype)
                weights[name] = block.shaped(name, dense)
    return rounded


def gptq_group(
    block: Block, names: tuple[str, ...], algorithm: Gptq, moments: list[InputMoments]
) -> dict[str, Rounded]:
    """GPTQ on the targets that read one input (one for each expert); uses ``moments`` up."""
    parts: dict[str, list[tuple[QuantizedWeight, ModuleFacts]]] = {name: [] for name in names}
    common = pooled(moments)
    count = len(moments)
    for expert in range(count):
        began = time.monotonic()
        tokens = moments[0].tokens
        if tokens < MIN_TOKENS and count > 1:
            del moments[0]
            for name in names:
                parts[name].append(_uncalibrated(block, name, expert, algorithm, common, tokens))
            continue
        moment = moments.pop(0).second_moment()
        factor = factorize(moment, GptqSettings(algorithm.damp, algorithm.act_order))
        shared = (time.monotonic() - began) / len(names)
        for name in names:
            began = time.monotonic()
            weight, grid = block.experts(name)[expert], block.targets[name].grid
            scales = initial_scales(algorithm.scale_init, weight, grid, moment.diagonal())
            result = gptq(weight, factor, scales, grid)
            nearest = round_to_grid(weight, scales, grid)
            facts = ModuleFacts(
                tokens=tokens,
                output_error=correlated_output_error(weight, result, moment),
                rtn_output_error=correlated_output_error(weight, nearest, moment),
                damping=factor.damping,
                damping_increases=factor.damping_increases,
                dead_channels=factor.dead,
                seconds=shared + time.monotonic() - began,
            )
            parts[name].append((result, facts))
    return {name: _joined(block, name, done) for name, done in parts.items()}


def _uncalibrated(
    block: Block,
    name: str,
    expert: int,
    algorithm: Gptq,
    importance_I: torch.Tensor,
    tokens: int,
) -> tuple[QuantizedWeight, ModuleFacts]:
    weight, grid = block.experts(name)[expert], block.targets[name].grid
    scales = initial_scales(algorithm.scale_init, weight, grid, importance_I)
    facts = ModuleFacts(tokens=tokens, too_few_tokens=True)
    return round_to_grid(weight, scales, grid), facts


def _joined(block: Block, name: str, parts: list[tuple[QuantizedWeight, ModuleFacts]]) -> Rounded:
    """Experts one below the other again."""
    target = block.targets[name]
    weight = QuantizedWeight(
        torch.cat([part.codes for part, _ in parts]),
        torch.cat([part.scales for part, _ in parts]),
        target.grid,
    )
    per_expert = len(target.modules) // len(parts)
    return Rounded(weight, tuple(facts for _, facts in parts for _ in range(per_expert)))


def diagonal_facts(
    block: Block, name: str, weight: QuantizedWeight, moments: list[InputMoments]
) -> Rounded:
    """Facts of algorithms that know their inputs' mean squares only."""
    target = block.targets[name]
    per_expert = len(target.modules) // len(moments)
    facts = []
    for matrix, part, seen, importance in zip(
        block.experts(name), _split(weight, len(moments)), moments, importances(moments),
        strict=True,
    ):  # fmt: skip
        error = relative_output_error(matrix, part, importance)
        few = len(moments) > 1 and seen.tokens < MIN_TOKENS
        facts += [ModuleFacts(seen.tokens, error, too_few_tokens=few)] * per_expert
    return Rounded(weight, tuple(facts))


def _split(weight: QuantizedWeight, count: int) -> Iterator[QuantizedWeight]:
    pairs = zip(weight.codes.chunk(count), weight.scales.chunk(count), strict=True)
    return (QuantizedWeight(codes, scales, weight.grid) for codes, scales in pairs)
