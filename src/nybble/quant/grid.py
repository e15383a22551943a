"""Symmetric integer grids: what a weight is rounded to, and back.

Knows tensors only. Legend for shapes: O out_features, I in_features, G groups, g = I / G inputs
per group. A code q is an integer in [-2^(b-1), 2^(b-1) - 1]; the weight it stands for is
``q * scale`` of its group. Working copies are grouped views [O, G, g].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nybble.core.errors import QuantizationError

MIN_SCALE = 2.0**-14
"""Smallest normal FP16 number; below it a BF16 scale is no longer exact in FP16."""
MAX_SCALE = 2.0**15
"""Largest power of two that FP16 holds."""
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 26
"""Elements of a chunk of rows."""


@dataclass(frozen=True)
class IntGrid:
    """A symmetric grid of ``bits`` bits with one scale per ``group_size`` inputs (-1: per row)."""

    bits: int
    group_size: int
    signed_scales: bool

    @property
    def lowest(self) -> int:
        """The smallest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, in_features: int) -> int:
        """Groups per output row; raises QuantizationError if they do not divide the row."""
        group_size = in_features if self.group_size == -1 else self.group_size
        if in_features % group_size:
            raise QuantizationError(
                f"{in_features} input features are no multiple of group size {group_size}"
            )
        return in_features // group_size


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes with their scales: what every algorithm returns and every format stores."""

    codes: torch.Tensor
    """int8 [O, I]"""
    scales: torch.Tensor
    """float32 [O, G], each value exact in BF16 and in FP16"""
    grid: IntGrid

    def dequantize(self) -> torch.Tensor:
        """The weight the codes stand for, float32 [O, I]."""
        codes_OGg = self.codes.float().view(*self.scales.shape, -1)
        return codes_OGg.mul_(self.scales.unsqueeze(-1)).flatten(1)


def grouped(weight_OI: torch.Tensor, grid: IntGrid) -> torch.Tensor:
    """[O, I] as a float32 view or copy [O, G, g]."""
    outs, ins = weight_OI.shape
    return weight_OI.float().reshape(outs, grid.num_groups(ins), -1)


def row_chunks(weight_OI: torch.Tensor) -> Iterator[slice]:
    """Slices of rows for work that would otherwise make float32 copies of the whole weight.

    On a CPU they fit its cache, where elementwise work is several times as fast (docs/LOG.md).
    """
    elements = _CPU_CHUNK if weight_OI.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, elements // max(1, weight_OI.shape[1]))
    return (slice(start, start + step) for start in range(0, len(weight_OI), step))


def exact_scale(scale: torch.Tensor) -> torch.Tensor:
    """Rounds scales to float32 values that BF16 and FP16 both hold exactly.

    Engines keep scales in either type; only values exact in both de-quantize to the same weight
    everywhere. Magnitudes are clamped to [2^-14, 2^15]; the sign is kept, zero becomes positive.
    """
    magnitude = scale.abs().bfloat16().float().clamp(MIN_SCALE, MAX_SCALE)
    return torch.where(scale < 0, -magnitude, magnitude)


def extremes(weight_OGg: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes of the most negative and the most positive weight of each group, [O, G] each."""
    lowest, highest = weight_OGg.aminmax(dim=-1)
    return -lowest.clamp(max=0), highest.clamp(min=0)


def scale_from_extremes(
    negative_OG: torch.Tensor, positive_OG: torch.Tensor, grid: IntGrid
) -> torch.Tensor:
    """Scale [O, G] (not yet exact) that spans a group's extremes.

    Signed: the grid has one code more on its negative side, so that side is turned, by the
    scale's sign, towards the larger extreme: ``max / 2^(b-1)``. Positive: both extremes fit.
    """
    if grid.signed_scales:
        larger = torch.maximum(negative_OG, positive_OG) / -grid.lowest
        return torch.where(positive_OG > negative_OG, -larger, larger)
    return torch.maximum(negative_OG / -grid.lowest, positive_OG / grid.highest)


def minmax_scale(weight_OI: torch.Tensor, grid: IntGrid) -> torch.Tensor:
    """The exact scale [O, G] under which no weight of a group is clipped (but for rounding)."""
    scales = []
    for rows in row_chunks(weight_OI):
        negative, positive = extremes(grouped(weight_OI[rows], grid))
        scales.append(exact_scale(scale_from_extremes(negative, positive, grid)))
    return torch.cat(scales)


def round_to_grid(
    weight_OI: torch.Tensor, scales_OG: torch.Tensor, grid: IntGrid
) -> QuantizedWeight:
    """Nearest code of every weight under given exact scales.

    Raises QuantizationError if a weight is not finite.
    """
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.int8, device=weight_OI.device)
    for rows in row_chunks(weight_OI):
        codes = torch.round(grouped(weight_OI[rows], grid) / scales_OG[rows].unsqueeze(-1))
        if not bool(torch.isfinite(codes).all()):
            bad = int((~torch.isfinite(weight_OI)).sum())
            raise QuantizationError(f"{bad} of {weight_OI.numel()} weights are NaN or infinite")
        codes_OI[rows] = codes.clamp_(grid.lowest, grid.highest).to(torch.int8).flatten(1)
    return QuantizedWeight(codes_OI, scales_OG, grid)
