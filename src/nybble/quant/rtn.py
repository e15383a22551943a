"""Round to nearest."""

from __future__ import annotations

import torch

from nybble.quant.grid import IntGrid, QuantizedWeight, round_to_grid
from nybble.quant.scale_search import ScaleMethod, initial_scales


def rtn(
    weight_OI: torch.Tensor,
    grid: IntGrid,
    scale_init: ScaleMethod = "minmax",
    importance_I: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Rounds each weight to the nearest code under the initial scales (see scale_search)."""
    scales = initial_scales(scale_init, weight_OI, grid, importance_I)
    return round_to_grid(weight_OI, scales, grid)
