"""SignRound: rounding and clipping learned by sign gradient descent (arXiv 2309.05516).

For each weight the code is ``round(w / s + V)``, V in [-0.5, 0.5], and for each group the scale
follows from extremes shrunk by two factors in [0, 1] (or up to a searched start above 1). Both
are trained together, for all linears of one block at once, against the block's full-precision
output; each step moves every parameter by the learning rate against the sign of its gradient.
The parameters with the lowest minibatch loss win, as published.

Knows tensors and one callable, no model. Peak memory beside the callable's own: per quantized
weight, the original, V (float32), one fake-quantized copy, and the best codes (int8). Gradients
of V exist for one linear at a time: each is consumed in the backward pass as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nybble.core.errors import QuantizationError
from nybble.quant.grid import (
    IntGrid,
    QuantizedWeight,
    exact_scale,
    extremes,
    grouped,
    scale_from_extremes,
)

Inputs = TypeVar("Inputs")
"""Whatever the caller's ``batches`` yield and its ``forward`` takes."""


@dataclass(frozen=True)
class SignRoundSettings:
    """Number of steps, and the first step's sizes (they decay linearly to zero)."""

    iters: int
    lr: float
    minmax_lr: float


@dataclass(frozen=True)
class SignRoundResult:
    """The best parameters found, and the minibatch losses (mean squared error) of the search."""

    quantized: dict[str, QuantizedWeight]
    first_loss: float
    best_loss: float
    best_iter: int


def signround(
    weights: Mapping[str, torch.Tensor],
    initial_scales: Mapping[str, torch.Tensor],
    grids: Mapping[str, IntGrid],
    forward: Callable[[Mapping[str, torch.Tensor], Inputs], torch.Tensor],
    batches: Callable[[int], tuple[Inputs, torch.Tensor]],
    settings: SignRoundSettings,
    compute_dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> SignRoundResult:
    """Quantizes the weights of one block.

    weights: [O, I] by name, in the dtype and on the device of the base. initial_scales: exact
    scales [O, G] to start from. batches: step -> (inputs, targets); targets are the full-precision
    block's outputs. forward: (weights [O, I] in compute_dtype, inputs) -> outputs of the targets'
    shape, differentiable in the weights. on_step is told every step's loss.
    Raises QuantizationError if the loss is not finite.
    """
    roundings = {
        name: _Rounding(weight, initial_scales[name], grids[name], compute_dtype)
        for name, weight in weights.items()
    }
    best: dict[str, QuantizedWeight] = {}
    best_loss, best_iter, first_loss = float("inf"), -1, float("nan")
    for step in range(settings.iters):
        inputs, targets = batches(step)
        rounded = {name: rounding.fake_quantized() for name, rounding in roundings.items()}
        loss = _mean_squared_error(forward(rounded, inputs), targets)
        value = loss.item()
        if not value < float("inf"):
            raise QuantizationError(
                f"block loss is {value} at step {step}: are inputs and weights finite?"
            )
        if step == 0:
            first_loss = value
        if value < best_loss:
            best_loss, best_iter = value, step
            best = {name: rounding.quantized() for name, rounding in roundings.items()}
        decay = 1 - step / settings.iters
        for rounding in roundings.values():
            rounding.set_steps(settings.lr * decay, settings.minmax_lr * decay)
        del rounded
        loss.backward()  # the hooks of _Rounding take the steps
        on_step(step, value)
    for rounding in roundings.values():
        rounding.release()
    return SignRoundResult(best, first_loss, best_loss, best_iter)


def _mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - targets.float()).square().mean()


class _Rounding:
    """The trained parameters of one weight; each takes its own step when its gradient arrives."""

    def __init__(
        self,
        weight_OI: torch.Tensor,
        scales_OG: torch.Tensor,
        grid: IntGrid,
        compute_dtype: torch.dtype,
    ) -> None:
        self.weight = weight_OI
        self.grid = grid
        self.compute_dtype = compute_dtype
        self.offset = torch.zeros(weight_OI.shape, device=weight_OI.device, requires_grad=True)
        negative, positive = extremes(grouped(weight_OI, grid))
        spanned = scale_from_extremes(negative, positive, grid)
        # A searched initial scale is a shrunk span, perhaps with the other sign.
        flipped = (scales_OG < 0) != (spanned < 0)
        self.negative = torch.where(flipped, positive, negative)
        self.positive = torch.where(flipped, negative, positive)
        factor = scales_OG.abs() / spanned.abs().clamp(min=torch.finfo(torch.float32).tiny)
        # exact_scale may have moved a min-max scale a little: that is no shrinking. (Searched
        # ranges differ from the span by 2 % or more.)
        factor = torch.where((factor - 1).abs() < 0.01, torch.ones_like(factor), factor)
        self.ceiling = factor.clamp(min=1.0)
        self.shrink_negative = factor.clone().requires_grad_()
        self.shrink_positive = factor.clone().requires_grad_()
        self.lr = self.minmax_lr = 0.0
        self._hooks = [self.offset.register_post_accumulate_grad_hook(self._step_offset)]
        for shrink in (self.shrink_negative, self.shrink_positive):
            self._hooks.append(shrink.register_post_accumulate_grad_hook(self._step_shrink))

    def release(self) -> None:
        """Takes the hooks off: they refer back to this object, and so would keep it in memory."""
        for hook in self._hooks:
            hook.remove()

    def set_steps(self, lr: float, minmax_lr: float) -> None:
        self.lr, self.minmax_lr = lr, minmax_lr

    def scale(self) -> torch.Tensor:
        """The exact scale [O, G]; gradients pass straight through the rounding to exactness."""
        negative = self.negative * self.shrink_negative
        positive = self.positive * self.shrink_positive
        smooth = scale_from_extremes(negative, positive, self.grid)
        return smooth + (exact_scale(smooth) - smooth).detach()

    def fake_quantized(self) -> torch.Tensor:
        """The quantized weight [O, I] in the compute dtype, differentiable."""
        result = _FakeQuantize.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.weight, self.offset, self.scale(), self.grid, self.compute_dtype
        )
        assert isinstance(result, torch.Tensor)
        return result

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes and scales of the present parameters."""
        scales = exact_scale(self.scale())
        codes = _codes(self.weight, self.offset, scales, self.grid)
        return QuantizedWeight(codes.to(torch.int8).flatten(1), scales, self.grid)

    def _step_offset(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad.sign_(), alpha=self.lr).clamp_(-0.5, 0.5)
        parameter.grad = None

    def _step_shrink(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            parameter.sub_(parameter.grad.sign_(), alpha=self.minmax_lr)
            parameter.copy_(torch.minimum(parameter.clamp(min=0.0), self.ceiling))
        parameter.grad = None


def _codes(
    weight_OI: torch.Tensor, offset_OI: torch.Tensor, scales_OG: torch.Tensor, grid: IntGrid
) -> torch.Tensor:
    codes = grouped(weight_OI, grid) / scales_OG.unsqueeze(-1)
    codes += offset_OI.view_as(codes)
    return codes.round_().clamp_(grid.lowest, grid.highest)


class _FakeQuantize(torch.autograd.Function):
    """``clamp(round(w / s + V)) * s``, with rounding passed straight through in the backward.

    Where a code is clamped, V has no effect and the weight moves with the scale alone.
    Intermediate values are recomputed in the backward instead of being kept.
    """

    @staticmethod
    def forward(
        ctx: Any,  # torch's context has no public type
        weight_OI: torch.Tensor,
        offset_OI: torch.Tensor,
        scales_OG: torch.Tensor,
        grid: IntGrid,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, offset_OI, scales_OG)
        ctx.grid = grid
        codes = _codes(weight_OI, offset_OI, scales_OG, grid)
        return codes.mul_(scales_OG.unsqueeze(-1)).flatten(1).to(dtype)

    @staticmethod
    def backward(
        ctx: Any, gradient_OI: torch.Tensor
    ) -> tuple[None, torch.Tensor, torch.Tensor, None, None]:
        weight, offset, scales = ctx.saved_tensors
        grid: IntGrid = ctx.grid
        scale = scales.unsqueeze(-1)
        ratio = grouped(weight, grid) / scale
        unclamped = (ratio + offset.view_as(ratio)).round_()
        codes = unclamped.clamp(grid.lowest, grid.highest)
        inside = codes == unclamped
        gradient = gradient_OI.float().view_as(ratio)
        codes -= ratio.mul_(inside)
        grad_scale = codes.mul_(gradient).sum(dim=-1)
        grad_offset = (gradient * scale).mul_(inside).flatten(1)
        return None, grad_offset, grad_scale, None, None
