"""The scale search, once more as a loop over candidates and weights in Python floats.

Errors are sums, and sums round: the searched scale must be a candidate, and no candidate may be
better by more than float32 can tell.
"""

from __future__ import annotations

import pytest
import torch

from nybble.quant.grid import IntGrid, exact_scale, minmax_scale
from nybble.quant.scale_search import initial_scales, searched_scale

GROUP = 16
GRIDS = [(bits, signed) for bits in (2, 3, 4, 8) for signed in (True, False)]


def sample(seed: int, heavy_tails: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 3 * GROUP, generator=generator) * 0.02
    if heavy_tails:
        weight = weight * torch.randn(6, 3 * GROUP, generator=generator).abs() ** 2
    importance = torch.rand(3 * GROUP, generator=generator) ** 6 * 100
    return weight, importance


def squared_error(group: list[float], scale: float, bits: int, importance: list[float]) -> float:
    total = 0.0
    for weight, factor in zip(group, importance, strict=True):
        code = min(max(round(weight / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
        total += factor * (code * scale - weight) ** 2
    return total


def candidates(group: list[float], bits: int, signed: bool) -> list[float]:
    """Full range and 2 % more, then less and less of it, in both directions if signed."""
    top, bottom = max(0.0, *group), max(0.0, *(-weight for weight in group))
    if bits > 3:
        shares = [percent / 100 for percent in range(102, 69, -2)]
    else:
        shares = [percent / 100 for percent in range(102, 33, -4)]
    half = 2 ** (bits - 1)
    if signed:
        span = max(top, bottom) / half * (-1 if top > bottom else 1)
        spans = [span, *(span * share * sign for share in shares for sign in (1, -1))]
    else:
        span = max(bottom / half, top / (half - 1))
        spans = [span, *(span * share for share in shares)]
    return exact_scale(torch.tensor(spans)).tolist()


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("heavy_tails", [False, True])
def test_no_candidate_is_better(bits: int, signed: bool, weighted: bool, heavy_tails: bool) -> None:
    weight, importance = sample(bits, heavy_tails)
    found = searched_scale(weight, IntGrid(bits, GROUP, signed), importance if weighted else None)
    for row, row_scales in zip(weight.tolist(), found.tolist(), strict=True):
        for g, scale in enumerate(row_scales):
            part = slice(g * GROUP, (g + 1) * GROUP)
            factors = importance[part].tolist() if weighted else [1.0] * GROUP
            known = candidates(row[part], bits, signed)
            assert scale in known
            least = min(squared_error(row[part], other, bits, factors) for other in known)
            assert squared_error(row[part], scale, bits, factors) <= least * (1 + 1e-5)


def errors_OG(
    weight: torch.Tensor, scales: torch.Tensor, bits: int, importance: torch.Tensor
) -> torch.Tensor:
    factors = importance.view(-1, GROUP).tolist()
    return torch.tensor(
        [
            [
                squared_error(row[g * GROUP : (g + 1) * GROUP], scale, bits, factors[g])
                for g, scale in enumerate(row_scales)
            ]
            for row, row_scales in zip(weight.tolist(), scales.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_searched_error_is_at_most_the_minmax_error(bits: int, signed: bool) -> None:
    weight, _ = sample(10 + bits, heavy_tails=True)
    grid = IntGrid(bits, GROUP, signed)
    alike = torch.ones(weight.shape[1])
    searched = errors_OG(weight, initial_scales("mse", weight, grid), bits, alike)
    minmax = errors_OG(weight, minmax_scale(weight, grid), bits, alike)
    assert bool((searched <= minmax * (1 + 1e-5)).all())
    assert float(searched.sum()) < float(minmax.sum())


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_importance_decides_which_errors_count(bits: int, signed: bool) -> None:
    weight, importance = sample(20 + bits)
    grid = IntGrid(bits, GROUP, signed)
    weighted_scales = initial_scales("importance", weight, grid, importance)
    plain_scales = initial_scales("mse", weight, grid, importance)
    weighted = errors_OG(weight, weighted_scales, bits, importance)
    plain = errors_OG(weight, plain_scales, bits, importance)
    assert bool((weighted <= plain * (1 + 1e-5)).all())
    assert float(weighted.sum()) < 0.97 * float(plain.sum())


def test_equal_importance_is_no_importance() -> None:
    weight, _ = sample(3)
    grid = IntGrid(4, GROUP, True)
    fours = torch.full((weight.shape[1],), 4.0)  # a power of two: no rounding differs
    assert torch.equal(searched_scale(weight, grid, fours), searched_scale(weight, grid, None))


def test_the_other_direction_wins_where_it_fits_better() -> None:
    # Two bits reach 1 at one end only. The largest weight wants that end on the negative side, the
    # fifteen others on the positive one.
    row = [-1.01] + [1.0] * (GROUP - 1)
    grid = IntGrid(2, GROUP, True)
    weight = torch.tensor([row])
    assert minmax_scale(weight, grid).item() > 0
    assert searched_scale(weight, grid, None).item() < 0
