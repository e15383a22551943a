"""Initial scales: min-max, or the clipping that minimises the (weighted) rounding error."""

from __future__ import annotations

from typing import Literal

import torch

from nybble.core.errors import QuantizationError
from nybble.quant.grid import (
    IntGrid,
    exact_scale,
    extremes,
    grouped,
    minmax_scale,
    row_chunks,
    scale_from_extremes,
)

ScaleMethod = Literal["minmax", "mse", "importance"]

# Shrinking the range below 0.7 only pays on very coarse grids; above 1 a group whose extremes
# fall between codes can win a little.
_SHRINKS = tuple(1.02 - 0.02 * i for i in range(17))
_COARSE_SHRINKS = tuple(1.02 - 0.04 * i for i in range(18))


def initial_scales(
    method: ScaleMethod,
    weight_OI: torch.Tensor,
    grid: IntGrid,
    importance_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact scales [O, G] by one of the recipe's methods.

    ``importance_I``, float32 [I], is the mean square of each input channel; the "importance"
    method needs it, as the expected output error is the sum of importance * (rounding error)^2.
    """
    if method == "minmax":
        return minmax_scale(weight_OI, grid)
    if method == "mse":
        return searched_scale(weight_OI, grid, None)
    if importance_I is None:
        raise ValueError("scale_init 'importance' needs the mean square of the inputs")
    return searched_scale(weight_OI, grid, importance_I)


def searched_scale(
    weight_OI: torch.Tensor, grid: IntGrid, importance_I: torch.Tensor | None
) -> torch.Tensor:
    """The exact scale [O, G] with the least weighted squared error among shrunk ranges.

    With signed scales both signs of every candidate are tried. Raises QuantizationError if the
    importance is not finite.
    """
    if importance_I is not None and not bool(torch.isfinite(importance_I).all()):
        raise QuantizationError("the mean square of an input channel is NaN or infinite")
    if importance_I is not None:
        importance_I = importance_I.float().contiguous()  # a diagonal's strides would cost 5 times
    chunks = row_chunks(weight_OI)
    return torch.cat([_searched(weight_OI[rows], grid, importance_I) for rows in chunks])


def _searched(
    weight_OI: torch.Tensor, grid: IntGrid, importance_I: torch.Tensor | None
) -> torch.Tensor:
    weight = grouped(weight_OI, grid)
    importance = None
    if importance_I is not None:
        importance = importance_I.view(1, weight.shape[1], weight.shape[2])
    base = scale_from_extremes(*extremes(weight), grid)
    signs = (1.0, -1.0) if grid.signed_scales else (1.0,)
    shrinks = _SHRINKS if grid.bits > 3 else _COARSE_SHRINKS
    best = exact_scale(base)
    scratch = torch.empty_like(weight)
    best_error = _error(weight, best, grid, importance, scratch)
    for shrink in shrinks:
        for sign in signs:
            candidate = exact_scale(base * (shrink * sign))
            error = _error(weight, candidate, grid, importance, scratch)
            better = error < best_error
            best = torch.where(better, candidate, best)
            best_error = torch.where(better, error, best_error)
    return best


def _error(
    weight_OGg: torch.Tensor,
    scale_OG: torch.Tensor,
    grid: IntGrid,
    importance: torch.Tensor | None,
    scratch_OGg: torch.Tensor,
) -> torch.Tensor:
    """Weighted squared rounding error of each group; in place, as this is where the time goes."""
    scale = scale_OG.unsqueeze(-1)
    error = torch.div(weight_OGg, scale, out=scratch_OGg)
    error.round_().clamp_(grid.lowest, grid.highest).mul_(scale).sub_(weight_OGg).square_()
    if importance is not None:
        error *= importance
    return error.sum(dim=-1)
