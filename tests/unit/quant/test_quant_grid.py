from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nybble.core.errors import QuantizationError
from nybble.quant.grid import (
    MAX_SCALE,
    MIN_SCALE,
    IntGrid,
    exact_scale,
    minmax_scale,
    round_to_grid,
)
from nybble.quant.rtn import rtn

# Without denormals: our own code flushes them, for the whole process.
finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def one_exact(value: float) -> float:
    return exact_scale(torch.tensor([value], dtype=torch.float32)).item()


@given(value=finite_floats)
def test_an_exact_scale_survives_bf16_and_fp16(value: float) -> None:
    scale = exact_scale(torch.tensor([value], dtype=torch.float32))
    assert scale.dtype == torch.float32
    assert torch.equal(scale.bfloat16().float(), scale)
    assert torch.equal(scale.half().float(), scale)
    assert torch.equal(exact_scale(scale), scale)


@given(value=finite_floats)
def test_an_exact_scale_is_near_and_keeps_its_sign(value: float) -> None:
    scale = one_exact(value)
    assert (scale < 0) == (value < 0)
    clamped = min(max(abs(value), MIN_SCALE), MAX_SCALE)
    assert abs(abs(scale) - clamped) <= clamped * 2**-8


@given(one=finite_floats, other=finite_floats)
def test_exact_scales_are_monotone(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert one_exact(low) <= one_exact(high)


@pytest.mark.parametrize(
    ("value", "exact"),
    [
        (0.0, 2.0**-14),
        (-0.0, 2.0**-14),
        (1e-30, 2.0**-14),
        (-1e-30, -(2.0**-14)),
        (3e38, 2.0**15),
        (-3e38, -(2.0**15)),
        (1.0, 1.0),
        (1 + 2**-8, 1.0),  # halfway: to the even mantissa
        (1 + 3 * 2**-8, 1 + 2**-6),
        (-0.1, -0.10009765625),
    ],
)
def test_known_exact_scales(value: float, exact: float) -> None:
    assert one_exact(value) == exact


@pytest.mark.parametrize(
    ("bits", "lowest", "highest"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)]
)
def test_the_codes_of_a_grid(bits: int, lowest: int, highest: int) -> None:
    grid = IntGrid(bits, 128, True)
    assert (grid.lowest, grid.highest) == (lowest, highest)


def test_groups_of_a_row() -> None:
    assert IntGrid(4, 128, True).num_groups(512) == 4
    assert IntGrid(4, -1, True).num_groups(500) == 1


def test_groups_that_do_not_divide_a_row() -> None:
    grid = IntGrid(4, 128, True)
    with pytest.raises(QuantizationError, match=r"^200 input features .* group size 128$"):
        grid.num_groups(200)
    with pytest.raises(QuantizationError, match="200"):
        rtn(torch.zeros(2, 200), grid)


def test_a_signed_scale_points_the_longer_side_at_the_largest_weight() -> None:
    grid = IntGrid(4, 4, True)
    weight = torch.tensor([[4.0, -2.0, 1.0, 0.5], [-4.0, 2.0, 1.0, 0.5]])
    quantized = rtn(weight, grid)
    assert quantized.scales.tolist() == [[-0.5], [0.5]]
    assert quantized.codes.tolist() == [[-8, 4, -2, -1], [-8, 4, 2, 1]]
    assert torch.equal(quantized.dequantize(), weight)


def test_a_positive_scale_fits_both_extremes() -> None:
    grid = IntGrid(4, 4, False)
    weight = torch.tensor([[3.5, -2.0, 1.0, 0.5], [-4.0, 2.0, 1.0, 0.5]])
    quantized = rtn(weight, grid)
    assert quantized.scales.tolist() == [[0.5], [0.5]]
    assert quantized.codes.tolist() == [[7, -4, 2, 1], [-8, 4, 2, 1]]


def test_each_group_has_its_own_scale() -> None:
    quantized = rtn(torch.tensor([[-8.0, 1.0, -16.0, 2.0]]), IntGrid(4, 2, True))
    assert quantized.scales.tolist() == [[1.0, 2.0]]
    assert quantized.codes.tolist() == [[-8, 1, -8, 1]]
    assert quantized.dequantize().tolist() == [[-8.0, 1.0, -16.0, 2.0]]


@pytest.mark.parametrize("signed", [True, False])
def test_a_group_of_zeros(signed: bool) -> None:
    weight = torch.tensor([[0.0, -0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]])
    for method in ("minmax", "mse"):
        quantized = rtn(weight, IntGrid(4, 4, signed), method)
        assert quantized.codes[0, :4].tolist() == [0, 0, 0, 0]
        assert quantized.scales[0, 0].item() == MIN_SCALE
        assert quantized.dequantize()[0, :4].tolist() == [0.0] * 4


def test_types_and_shapes() -> None:
    quantized = rtn(torch.randn(3, 8).bfloat16(), IntGrid(4, 4, True))
    assert (quantized.codes.dtype, quantized.codes.shape) == (torch.int8, (3, 8))
    assert (quantized.scales.dtype, quantized.scales.shape) == (torch.float32, (3, 2))
    dense = quantized.dequantize()
    assert (dense.dtype, dense.shape) == (torch.float32, (3, 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bf16_weights_are_rounded_as_their_float32_values(bits: int) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    grid = IntGrid(bits, 8, True)
    half, full = rtn(weight, grid), rtn(weight.float(), grid)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.scales, full.scales)


@pytest.mark.parametrize("method", ["minmax", "mse", "importance"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted(method: str, bad: float) -> None:
    weight = torch.ones(4, 16)
    weight[0, 3] = weight[2, 5] = weight[2, 6] = bad
    with pytest.raises(QuantizationError, match=r"^3 of 64 weights are NaN or infinite$"):
        rtn(weight, IntGrid(4, 8, True), method, torch.ones(16))


def test_a_searched_start_by_importance_needs_the_importance() -> None:
    with pytest.raises(ValueError, match="importance"):
        rtn(torch.ones(2, 8), IntGrid(4, 8, True), "importance")


@pytest.mark.parametrize("method", ["minmax", "mse", "importance"])
def test_the_weight_is_left_alone(method: str) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(16)
    before, importance_before = weight.clone(), importance.clone()
    rtn(weight, IntGrid(4, 8, True), method, importance).dequantize()
    assert torch.equal(weight, before)
    assert torch.equal(importance, importance_before)


def test_dequantizing_twice_gives_the_same() -> None:
    quantized = rtn(
        torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), IntGrid(4, 8, True)
    )
    assert torch.equal(quantized.dequantize(), quantized.dequantize())


def test_weights_on_the_grid_are_kept() -> None:
    grid = IntGrid(4, 16, True)
    codes = torch.arange(-8, 8, dtype=torch.float32)[None]
    quantized = round_to_grid(codes * 0.375, minmax_scale(codes * 0.375, grid), grid)
    assert quantized.codes.tolist() == [list(range(-8, 8))]
    assert quantized.scales.tolist() == [[0.375]]
