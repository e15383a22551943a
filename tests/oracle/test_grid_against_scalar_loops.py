"""The grid, once more in Python floats: one weight at a time, from the definition.

Python's floats are doubles; where float32 rounds (a quotient), ``f32`` rounds. Every other step is
exact in both, so results must be equal, not close.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.grid import IntGrid, minmax_scale, round_to_grid

GROUP = 4
GRIDS = [(bits, signed) for bits in (2, 3, 4, 8) for signed in (True, False)]


def f32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def eight_significant_bits(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def twin_scale(group: list[float], bits: int, signed: bool) -> float:
    top = max(0.0, *group)
    bottom = max(0.0, *(-weight for weight in group))
    negative_codes, positive_codes = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    if signed:
        scale = f32(max(top, bottom) / negative_codes)
        sign = -1.0 if top > bottom else 1.0
    else:
        scale = max(f32(bottom / negative_codes), f32(top / positive_codes))
        sign = 1.0
    if scale == 0:
        return 2.0**-14
    return sign * min(max(eight_significant_bits(scale), 2.0**-14), 2.0**15)


def twin_code(weight: float, scale: float, bits: int) -> int:
    code = round(f32(weight / scale))  # halves to even
    return min(max(code, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


def check_matrix(matrix: list[list[float]], bits: int, group_size: int, signed: bool) -> None:
    weight = torch.tensor(matrix, dtype=torch.float32)
    grid = IntGrid(bits, group_size, signed)
    scales = minmax_scale(weight, grid)
    quantized = round_to_grid(weight, scales, grid)
    size = len(matrix[0]) if group_size == -1 else group_size
    for row, codes, row_scales, dense in zip(
        matrix, quantized.codes, scales, quantized.dequantize(), strict=True
    ):
        groups = [row[start : start + size] for start in range(0, len(row), size)]
        expected = [twin_scale(group, bits, signed) for group in groups]
        assert row_scales.tolist() == expected
        for i, weight_i in enumerate(row):
            scale = expected[i // size]
            code = twin_code(weight_i, scale, bits)
            assert int(codes[i]) == code
            assert float(dense[i]) == code * scale


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
@pytest.mark.parametrize("group_size", [8, -1])
@pytest.mark.parametrize("spread", [1e-6, 0.02, 3.0, 1e5])
def test_normal_weights(bits: int, signed: bool, group_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    matrix = (torch.randn(6, 24, generator=generator) * spread).tolist()
    check_matrix(matrix, bits, group_size, signed)


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_weights_halfway_between_codes(bits: int, signed: bool) -> None:
    scale = 0.25
    extreme = -scale * 2 ** (bits - 1)  # makes the scale come out as 0.25 either way
    halves = [(code + 0.5) * scale for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1) - 2)]
    row = [extreme, *halves, 0.0]
    assert twin_scale(row, bits, signed) == scale
    check_matrix([row], bits, -1, signed)


@settings(max_examples=150, deadline=None)
@given(
    row=st.lists(st.floats(-1e7, 1e7, width=32), min_size=3 * GROUP, max_size=3 * GROUP),
    kind=st.sampled_from(GRIDS),
)
def test_any_weights(row: list[float], kind: tuple[int, bool]) -> None:
    check_matrix([row], kind[0], GROUP, kind[1])
