from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

import pytest
import torch

from nybble.core.errors import QuantizationError
from nybble.quant.grid import IntGrid, QuantizedWeight, minmax_scale
from nybble.quant.rtn import rtn
from nybble.quant.scale_search import ScaleMethod, initial_scales
from nybble.quant.signround import (
    SignRoundResult,
    SignRoundSettings,
    _Rounding,
    signround,
)

Tensors = dict[str, torch.Tensor]
HIDDEN, INNER = 32, 64
NUM_BATCHES = 4
SETTINGS = SignRoundSettings(iters=40, lr=1 / 40, minmax_lr=1 / 40)


def forward(weights: Mapping[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    inner = torch.tanh(inputs @ weights["up"].T)
    return inputs + inner @ weights["down"].T


def sample_weights(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "up": (torch.randn(INNER, HIDDEN, generator=generator) * 0.2).to(dtype),
        "down": (torch.randn(HIDDEN, INNER, generator=generator) * 0.2).to(dtype),
    }


def sample_batches(weights: Tensors) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(NUM_BATCHES, 2, 8, HIDDEN, generator=generator)
    targets = forward({name: weight.float() for name, weight in weights.items()}, inputs)
    return lambda step: (inputs[step % NUM_BATCHES], targets[step % NUM_BATCHES])


def train(
    weights: Tensors,
    grid: IntGrid,
    settings: SignRoundSettings = SETTINGS,
    start: ScaleMethod = "minmax",
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> SignRoundResult:
    return signround(
        weights,
        {name: initial_scales(start, weight, grid) for name, weight in weights.items()},
        dict.fromkeys(weights, grid),
        forward,
        sample_batches(weights),
        settings,
        on_step=on_step,
    )


def loss_of(quantized: Mapping[str, QuantizedWeight], weights: Tensors, step: int) -> float:
    inputs, targets = sample_batches(weights)(step)
    dense = {name: result.dequantize() for name, result in quantized.items()}
    return float((forward(dense, inputs) - targets).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("signed", [True, False])
def test_training_beats_rounding_to_nearest(bits: int, group_size: int, signed: bool) -> None:
    weights, grid = sample_weights(), IntGrid(bits, group_size, signed)
    trained = train(weights, grid).quantized
    nearest = {name: rtn(weight, grid) for name, weight in weights.items()}
    before = sum(loss_of(nearest, weights, step) for step in range(NUM_BATCHES))
    after = sum(loss_of(trained, weights, step) for step in range(NUM_BATCHES))
    assert after < 0.8 * before


def test_two_runs_give_the_same_bits() -> None:
    grid = IntGrid(4, 16, True)
    one, other = train(sample_weights(), grid), train(sample_weights(), grid)
    assert (one.first_loss, one.best_loss, one.best_iter) == (
        other.first_loss,
        other.best_loss,
        other.best_iter,
    )
    for name, quantized in one.quantized.items():
        assert torch.equal(quantized.codes, other.quantized[name].codes)
        assert torch.equal(quantized.scales, other.quantized[name].scales)


@pytest.mark.parametrize("start", ["minmax", "mse"])
@pytest.mark.parametrize("signed", [True, False])
def test_one_iteration_rounds_to_nearest(start: ScaleMethod, signed: bool) -> None:
    weights, grid = sample_weights(), IntGrid(3, 16, signed)
    result = train(weights, grid, SignRoundSettings(1, 1.0, 1.0), start)
    for name, weight in weights.items():
        nearest = rtn(weight, grid, start)
        assert torch.equal(result.quantized[name].codes, nearest.codes)
        assert torch.equal(result.quantized[name].scales, nearest.scales)
    assert result.best_iter == 0
    assert result.first_loss == result.best_loss
    expected = loss_of(result.quantized, weights, 0)
    assert result.first_loss == pytest.approx(expected, rel=1e-6)


def test_the_best_loss_is_that_of_the_parameters_returned() -> None:
    weights = sample_weights()
    losses: list[tuple[int, float]] = []
    result = train(weights, IntGrid(3, 16, True), on_step=lambda *told: losses.append(told))
    assert [step for step, _ in losses] == list(range(SETTINGS.iters))
    values = [loss for _, loss in losses]
    assert result.first_loss == values[0]
    assert result.best_loss == min(values)
    assert result.best_iter == values.index(min(values)) > 0
    expected = loss_of(result.quantized, weights, result.best_iter)
    assert result.best_loss == pytest.approx(expected, rel=1e-6)


def test_of_equal_losses_the_first_wins() -> None:
    weights, grid = sample_weights(), IntGrid(4, 16, True)
    inputs, targets = sample_batches(weights)(0)
    still = SignRoundSettings(iters=5, lr=0.0, minmax_lr=0.0)
    scales = {name: initial_scales("minmax", weight, grid) for name, weight in weights.items()}
    result = signround(
        weights, scales, dict.fromkeys(weights, grid), forward, lambda _: (inputs, targets), still
    )
    assert result.best_iter == 0


def test_codes_and_scales_are_storable() -> None:
    grid = IntGrid(3, 16, True)
    for quantized in train(sample_weights(), grid).quantized.values():
        assert quantized.codes.dtype == torch.int8
        assert grid.lowest <= int(quantized.codes.min()) <= int(quantized.codes.max())
        assert int(quantized.codes.max()) <= grid.highest
        assert torch.equal(quantized.scales.half().float(), quantized.scales)
        assert torch.equal(quantized.scales.bfloat16().float(), quantized.scales)
        assert quantized.grid == grid


def test_a_code_moves_by_one_at_most_from_nearest_when_scales_stay() -> None:
    weights, grid = sample_weights(), IntGrid(4, 16, True)
    result = train(weights, grid, SignRoundSettings(40, lr=0.1, minmax_lr=0.0))
    for name, weight in weights.items():
        nearest = rtn(weight, grid)
        assert torch.equal(result.quantized[name].scales, nearest.scales)
        moved = (result.quantized[name].codes.int() - nearest.codes.int()).abs()
        assert int(moved.max()) == 1


def test_each_weight_has_its_own_grid() -> None:
    weights = sample_weights()
    grids = {"up": IntGrid(2, 16, False), "down": IntGrid(8, -1, True)}
    scales = {n: initial_scales("minmax", weight, grids[n]) for n, weight in weights.items()}
    result = signround(weights, scales, grids, forward, sample_batches(weights), SETTINGS)
    up, down = result.quantized["up"], result.quantized["down"]
    assert (up.grid, down.grid) == (grids["up"], grids["down"])
    assert (up.scales.shape, down.scales.shape) == ((INNER, HIDDEN // 16), (HIDDEN, 1))
    assert int(up.codes.abs().max()) <= 2 < int(down.codes.abs().max())


def test_what_was_given_is_left_alone() -> None:
    weights, grid = sample_weights(torch.float32), IntGrid(4, 16, True)
    scales = {name: initial_scales("mse", weight, grid) for name, weight in weights.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    scales_before = {name: scale.clone() for name, scale in scales.items()}
    grids = dict.fromkeys(weights, grid)
    signround(weights, scales, grids, forward, sample_batches(weights), SETTINGS)
    for name, weight in weights.items():
        assert torch.equal(weight, before[name])
        assert not weight.requires_grad
        assert torch.equal(scales[name], scales_before[name])


def test_results_carry_no_graph() -> None:
    for quantized in train(sample_weights(), IntGrid(4, 16, True)).quantized.values():
        assert not quantized.scales.requires_grad
        assert not quantized.codes.requires_grad


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_stop_the_search(bad: float) -> None:
    weights, grid = sample_weights(), IntGrid(4, 16, True)
    good = sample_batches(weights)

    def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = good(step)
        return (inputs, targets) if step < 2 else (torch.full_like(inputs, bad), targets)

    scales = {name: initial_scales("minmax", weight, grid) for name, weight in weights.items()}
    with pytest.raises(QuantizationError, match="at step 2"):
        signround(weights, scales, dict.fromkeys(weights, grid), forward, batches, SETTINGS)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite_stops_the_search(bad: float) -> None:
    weights = sample_weights()
    weights["up"][3, 5] = bad
    with pytest.raises(QuantizationError):
        train(weights, IntGrid(4, 16, True))


@pytest.mark.parametrize("signed", [True, False])
def test_a_group_of_zeros_stays_zero(signed: bool) -> None:
    weights = sample_weights()
    weights["up"][3, :16] = 0
    up = train(weights, IntGrid(4, 16, signed)).quantized["up"]
    assert int(up.codes[3, :16].count_nonzero()) == 0
    assert up.scales[3, 0].item() == 2.0**-14


def test_a_gradient_is_gone_once_its_step_is_taken() -> None:
    grid = IntGrid(4, 16, True)
    weight = sample_weights()["up"]
    rounding = _Rounding(weight, initial_scales("minmax", weight, grid), grid, torch.float32)
    parameters = (rounding.offset, rounding.shrink_negative, rounding.shrink_positive)
    rounding.set_steps(0.25, 0.125)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    slope = upstream * rounding.scale().detach().repeat_interleave(16, dim=1)
    (rounding.fake_quantized() * upstream).sum().backward()
    assert all(parameter.grad is None for parameter in parameters)
    offset = rounding.offset.detach()
    free = offset != 0  # the others' codes are clamped
    assert free.float().mean() > 0.9
    assert torch.equal(offset[free], -0.25 * slope.sign()[free])
    assert set(rounding.shrink_negative.flatten().tolist()) <= {1.0, 0.875}


def test_parameters_stay_in_their_bounds() -> None:
    grid = IntGrid(4, 16, True)
    weight = sample_weights()["up"]
    rounding = _Rounding(weight, initial_scales("minmax", weight, grid), grid, torch.float32)
    rounding.set_steps(10.0, 10.0)
    for _ in range(2):
        rounding.fake_quantized().square().sum().backward()
        assert float(rounding.offset.detach().abs().max()) == 0.5
        for shrink in (rounding.shrink_negative.detach(), rounding.shrink_positive.detach()):
            assert 0.0 <= float(shrink.min()) <= float(shrink.max()) <= 1.0


def test_nothing_of_a_block_stays_in_memory_without_the_garbage_collector() -> None:
    weight = torch.randn(32, 64)
    watched = weakref.ref(weight)
    grid = IntGrid(4, 32, True)
    inputs = torch.randn(2, 3, 64)
    gc.disable()
    try:
        signround(
            weights={"w": weight},
            initial_scales={"w": minmax_scale(weight, grid)},
            grids={"w": grid},
            forward=lambda weights, rows: rows @ weights["w"].T,
            batches=lambda _step: (inputs, torch.zeros(2, 3, 32)),
            settings=SignRoundSettings(2, 0.1, 0.1),
        )
        del weight
        assert watched() is None
    finally:
        gc.enable()
