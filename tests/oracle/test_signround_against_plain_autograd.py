"""SignRound (arXiv 2309.05516), once more as ordinary autograd: a straight-through estimator,
three parameters per weight, one gradient step after another, all in plain sight.

The twin keeps everything the real one avoids keeping: gradients of all weights at once, all
intermediate values, a snapshot of every parameter. Every forward value is computed by the same
float32 operations in the same order, and steps use the gradients' signs alone; so losses, codes
and scales are equal bit for bit, unless a gradient is zero but for its rounding errors. No
parameter of these small blocks is that balanced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from nybble.quant.grid import IntGrid
from nybble.quant.scale_search import ScaleMethod, initial_scales
from nybble.quant.signround import SignRoundSettings, _FakeQuantize, signround

Tensors = dict[str, torch.Tensor]
Batches = Callable[[int], tuple[torch.Tensor, torch.Tensor]]

HIDDEN, INNER = 16, 32


def value_of(exact: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """``exact``, with the gradient of ``smooth``."""
    return smooth + (exact - smooth).detach()


def storable(scale: torch.Tensor) -> torch.Tensor:
    size = scale.abs().to(torch.bfloat16).to(torch.float32).clamp(2.0**-14, 2.0**15)
    return torch.where(scale < 0, -size, size)


@dataclass
class TwinWeight:
    weight_OGg: torch.Tensor
    bits: int
    signed: bool
    below: torch.Tensor
    above: torch.Tensor
    offset_OGg: torch.Tensor
    shrink_below: torch.Tensor
    shrink_above: torch.Tensor
    largest_shrink: torch.Tensor

    def span(self) -> torch.Tensor:
        below, above = self.below * self.shrink_below, self.above * self.shrink_above
        lower, upper = 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1
        if self.signed:
            return torch.where(above > below, -above / lower, below / lower)
        return torch.maximum(below / lower, above / upper)

    def scale(self) -> torch.Tensor:
        span = self.span()
        return value_of(storable(span), span)

    def codes(self, scale_OG: torch.Tensor) -> torch.Tensor:
        position = self.weight_OGg / scale_OG[..., None] + self.offset_OGg
        whole = value_of(torch.round(position), position)
        return whole.clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)

    def fake_quantized(self, dtype: torch.dtype) -> torch.Tensor:
        scale = self.scale()
        return (self.codes(scale) * scale[..., None]).flatten(1).to(dtype)

    def parameters(self) -> list[torch.Tensor]:
        return [self.offset_OGg, self.shrink_below, self.shrink_above]


def twin_weight(weight: torch.Tensor, start: torch.Tensor, grid: IntGrid) -> TwinWeight:
    outs, groups = start.shape
    weight_OGg = weight.float().reshape(outs, groups, -1)
    below, above = (-weight_OGg).amax(-1).clamp(min=0), weight_OGg.amax(-1).clamp(min=0)
    empty = torch.ones_like(start)
    twin = TwinWeight(
        weight_OGg, grid.bits, grid.signed_scales, below, above,
        torch.zeros_like(weight_OGg), empty, empty, empty,
    )  # fmt: skip
    span = twin.span()
    turned = torch.sign(start) != torch.sign(span)
    twin.below = torch.where(turned, above, below)
    twin.above = torch.where(turned, below, above)
    shrink = (start / span).abs()
    shrink[(shrink - 1).abs() < 0.01] = 1.0  # the start's own rounding is no shrinking
    twin.shrink_below, twin.shrink_above = shrink.clone(), shrink.clone()
    twin.largest_shrink = torch.maximum(shrink, torch.ones_like(shrink))
    for parameter in twin.parameters():
        parameter.requires_grad_()
    return twin


@dataclass
class TwinResult:
    losses: list[float]
    best_iter: int
    codes: Tensors
    scales: Tensors


def twin_signround(
    twins: dict[str, TwinWeight],
    forward: Callable[[Tensors, torch.Tensor], torch.Tensor],
    batches: Batches,
    settings: SignRoundSettings,
    dtype: torch.dtype,
) -> TwinResult:
    losses, codes, scales = [], [], []
    for step in range(settings.iters):
        inputs, targets = batches(step)
        outputs = forward(
            {name: twin.fake_quantized(dtype) for name, twin in twins.items()}, inputs
        )
        loss = ((outputs.float() - targets.float()) ** 2).mean()
        losses.append(loss.item())
        with torch.no_grad():
            scales.append({name: storable(twin.span()) for name, twin in twins.items()})
            codes.append({n: twin.codes(scales[-1][n]).flatten(1) for n, twin in twins.items()})
        every = [parameter for twin in twins.values() for parameter in twin.parameters()]
        gradients = iter(torch.autograd.grad(loss, every))
        left = 1 - step / settings.iters
        with torch.no_grad():
            for twin in twins.values():
                twin.offset_OGg -= settings.lr * left * next(gradients).sign()
                twin.offset_OGg.clamp_(-0.5, 0.5)
                for shrink in (twin.shrink_below, twin.shrink_above):
                    shrink -= settings.minmax_lr * left * next(gradients).sign()
                    shrink.copy_(torch.minimum(shrink.clamp(min=0), twin.largest_shrink))
    best = losses.index(min(losses))
    return TwinResult(losses, best, codes[best], scales[best])


def block(weights: Tensors, inputs: torch.Tensor) -> torch.Tensor:
    inner = torch.nn.functional.silu(inputs.to(weights["up"].dtype) @ weights["up"].T)
    return inputs + inner @ weights["down"].T


def small_block(seed: int, dtype: torch.dtype) -> tuple[Tensors, Batches, torch.Tensor]:
    """Its weights, minibatches (4, in turn), and the mean square of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "up": torch.randn(INNER, HIDDEN, generator=generator) * 0.3,
        "down": torch.randn(HIDDEN, INNER, generator=generator) * 0.3,
    }
    loud = torch.rand(HIDDEN, generator=generator) * 2
    inputs = (torch.randn(4, 2, 5, HIDDEN, generator=generator) * loud).to(dtype)
    targets = block({name: weight.to(dtype) for name, weight in weights.items()}, inputs)
    return weights, lambda step: (inputs[step % 4], targets[step % 4]), loud.square()


CASES = [
    # bits, group size, signed scales, initial scales, compute dtype
    (4, 8, True, "minmax", torch.float32),
    (4, 8, False, "minmax", torch.float32),
    (4, 16, True, "mse", torch.float32),
    (4, -1, False, "importance", torch.float32),
    (3, 8, True, "importance", torch.float32),
    (3, -1, True, "minmax", torch.float32),
    (3, 16, False, "mse", torch.float32),
    (2, 8, True, "mse", torch.float32),
    (2, 8, False, "mse", torch.float32),
    (2, -1, True, "minmax", torch.float32),
    (8, 8, True, "mse", torch.float32),
    (8, -1, False, "minmax", torch.float32),
    (4, 8, True, "minmax", torch.bfloat16),
    (2, 16, True, "mse", torch.bfloat16),
]


@pytest.mark.parametrize(("bits", "group_size", "signed", "start", "dtype"), CASES)
def test_losses_codes_and_scales(
    bits: int, group_size: int, signed: bool, start: ScaleMethod, dtype: torch.dtype
) -> None:
    weights, batches, mean_square = small_block(bits + group_size, dtype)
    grid = IntGrid(bits, group_size, signed)
    importance = {"up": mean_square, "down": torch.linspace(0.1, 1, INNER)}
    scales = {n: initial_scales(start, w, grid, importance[n]) for n, w in weights.items()}
    settings = SignRoundSettings(iters=25, lr=0.04, minmax_lr=0.1 / 2**bits)

    twins = {name: twin_weight(weights[name], scales[name], grid) for name in weights}
    expected = twin_signround(twins, block, batches, settings, dtype)
    losses: list[float] = []
    result = signround(
        weights, scales, dict.fromkeys(weights, grid), block, batches, settings, dtype,
        on_step=lambda _step, loss: losses.append(loss),
    )  # fmt: skip

    assert losses == expected.losses
    assert (result.first_loss, result.best_loss) == (losses[0], min(losses))
    assert result.best_iter == expected.best_iter > 0
    for name in weights:
        assert torch.equal(result.quantized[name].scales, expected.scales[name])
        assert torch.equal(result.quantized[name].codes.float(), expected.codes[name])
    # The search must have gone somewhere, or all of this would compare the start with itself.
    assert any(not torch.equal(result.quantized[n].scales, scales[n]) for n in weights)


def test_a_searched_start_that_widens_or_turns_a_group_is_kept() -> None:
    weights, batches, _ = small_block(5, torch.float32)
    grid = IntGrid(2, 8, True)
    scales = {name: initial_scales("mse", weight, grid) for name, weight in weights.items()}
    minmax = {name: initial_scales("minmax", weight, grid) for name, weight in weights.items()}
    assert any(bool((scales[n].abs() > 1.01 * minmax[n].abs()).any()) for n in weights)
    assert any(bool((scales[n].sign() != minmax[n].sign()).any()) for n in weights)
    still = SignRoundSettings(iters=1, lr=0.1, minmax_lr=0.1)
    result = signround(weights, scales, dict.fromkeys(weights, grid), block, batches, still)
    for name in weights:
        assert torch.equal(result.quantized[name].scales, scales[name])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_fake_quantization(bits: int, signed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    grid = IntGrid(bits, 8, signed)
    weight = torch.randn(6, 32, generator=generator)
    # Ranges too narrow for some weights: their codes are clamped.
    scale = storable(initial_scales("minmax", weight, grid) * 0.7)
    offset = torch.rand(6, 32, generator=generator) - 0.5
    upstream = torch.randn(6, 32, generator=generator).to(dtype)

    twin = twin_weight(weight, scale, grid)
    twin_offset = offset.view(6, 4, 8).clone().requires_grad_()
    twin_scale = scale.clone().requires_grad_()
    twin.offset_OGg = twin_offset
    codes = twin.codes(twin_scale)
    expected = (codes * twin_scale[..., None]).flatten(1).to(dtype)
    expected.backward(upstream)

    offset.requires_grad_()
    scale.requires_grad_()
    found = _FakeQuantize.apply(weight, offset, scale, grid, dtype)
    found.backward(upstream)

    clamped = (weight.view(6, 4, 8) / scale[..., None] + offset.view(6, 4, 8)).round() != codes
    assert 0 < int(clamped.sum()) < clamped.numel()
    assert torch.equal(found, expected)
    assert torch.equal(offset.grad, twin_offset.grad.flatten(1))
    assert bool((offset.grad.view(6, 4, 8)[clamped] == 0).all())
    torch.testing.assert_close(scale.grad, twin_scale.grad, rtol=1e-5, atol=1e-5)


def test_gradients_by_hand() -> None:
    # Scale 0.5, codes -4..3. w / s + V: 1.0 + 0.2 -> 1; -1.5 + 0.1 -> -1; 4.0 -> clamped to 3.
    weight = torch.tensor([[0.5, -0.75, 2.0]])
    offset = torch.tensor([[0.2, 0.1, 0.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    upstream = torch.tensor([[10.0, 100.0, 1.0]])
    output = _FakeQuantize.apply(weight, offset, scale, IntGrid(3, -1, True), torch.float32)
    assert output.tolist() == [[0.5, -0.5, 1.5]]
    output.backward(upstream)
    assert offset.grad.tolist() == [[5.0, 50.0, 0.0]]
    # code - w / s where free, the code where clamped: 10 * (1 - 1) + 100 * (-1 + 1.5) + 1 * 3.
    assert scale.grad.tolist() == [[53.0]]
