from __future__ import annotations

import itertools
import math

import pytest
import torch

from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.metrics import (
    MEASURED_ROWS,
    correlated_output_error,
    relative_output_error,
    sqnr_db,
)
from nybble.quant.rtn import rtn


def quantized(codes: list[list[int]], scale: float = 1.0) -> QuantizedWeight:
    tensor = torch.tensor(codes, dtype=torch.int8)
    return QuantizedWeight(tensor, torch.full((len(codes), 1), scale), IntGrid(4, -1, True))


def test_a_hundredth_of_the_power_is_twenty_decibels() -> None:
    # Signal 6^2 + 8^2 = 100, noise 1.
    assert sqnr_db(torch.tensor([[6.0, 8.0]]), quantized([[6, 7]])) == pytest.approx(20.0)


def test_noise_as_large_as_the_signal_is_zero_decibels() -> None:
    assert sqnr_db(torch.tensor([[3.0, 4.0]]), quantized([[0, 0]])) == pytest.approx(0.0)


def test_a_weight_on_the_grid_has_no_noise() -> None:
    weight = torch.tensor([[0.5, -1.0]])
    assert sqnr_db(weight, quantized([[1, -2]], 0.5)) == math.inf
    assert relative_output_error(weight, quantized([[1, -2]], 0.5), torch.ones(2)) == 0
    assert correlated_output_error(weight, quantized([[1, -2]], 0.5), torch.ones(2, 2)) == 0


def test_a_weight_of_zeros() -> None:
    weight = torch.zeros(2, 2)
    assert sqnr_db(weight, quantized([[0, 0], [0, 0]])) == math.inf
    assert relative_output_error(weight, quantized([[0, 0], [0, 0]]), torch.ones(2)) == 0
    assert correlated_output_error(weight, quantized([[0, 0], [0, 0]]), torch.ones(2, 2)) == 0


def test_output_error_counts_channels_by_their_power() -> None:
    # Errors 1 in channel 0 (power 4) and 2 in channel 1 (power 0.25), of 3^2 * 4 + 4^2 * 0.25.
    weight, mean_square = torch.tensor([[3.0, 4.0]]), torch.tensor([4.0, 0.25])
    found = relative_output_error(weight, quantized([[2, 6]]), mean_square)
    assert found == pytest.approx((1 * 4 + 4 * 0.25) / (9 * 4 + 16 * 0.25))


def test_output_error_sums_over_all_outputs() -> None:
    weight, mean_square = torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([1.0, 2.0])
    found = relative_output_error(weight, quantized([[2, 0], [0, 2]]), mean_square)
    assert found == pytest.approx((1 + 9 * 2) / (9 + 25 * 2))


def test_output_error_is_that_of_real_outputs_when_channels_are_uncorrelated() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    result = rtn(weight, IntGrid(3, 8, True))
    orthogonal, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    inputs = orthogonal * (torch.rand(16, generator=generator) + 0.1)  # its columns stay orthogonal
    errors = inputs @ (weight - result.dequantize()).T
    expected = float(errors.square().sum() / (inputs @ weight.T).square().sum())
    found = relative_output_error(weight, result, inputs.square().mean(dim=0))
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0.001 < found < 0.5


def test_output_error_is_that_of_real_outputs_of_correlated_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    result = rtn(weight, IntGrid(3, 8, True))
    inputs = torch.randn(50, 2, generator=generator) @ torch.randn(2, 16, generator=generator)
    errors = inputs @ (weight - result.dequantize()).T
    expected = float(errors.square().sum() / (inputs @ weight.T).square().sum())
    moment = inputs.T @ inputs / 50
    assert correlated_output_error(weight, result, moment) == pytest.approx(expected, rel=1e-4)
    uncorrelated = relative_output_error(weight, result, moment.diagonal())
    assert uncorrelated != pytest.approx(expected, rel=0.05)
    alone = correlated_output_error(weight, result, torch.diag(moment.diagonal()))
    assert alone == pytest.approx(uncorrelated, rel=1e-4)


@pytest.mark.parametrize("outs", [MEASURED_ROWS, MEASURED_ROWS + 1, 3 * MEASURED_ROWS])
def test_output_error_of_many_outputs_is_that_of_rows_spread_over_all(outs: int) -> None:
    # An error in one row only, of which MEASURED_ROWS are looked at.
    moment = torch.ones(2, 2)
    seen = []
    for row in range(outs):
        codes = torch.full((outs, 2), 4, dtype=torch.int8)
        codes[row, 0] = 5
        result = QuantizedWeight(codes, torch.ones(outs, 1), IntGrid(4, -1, True))
        found = correlated_output_error(torch.full((outs, 2), 4.0), result, moment)
        assert found in (0.0, pytest.approx(1 / 64 / MEASURED_ROWS))
        if found:
            seen.append(row)
    assert len(seen) == MEASURED_ROWS
    gaps = {after - before for before, after in itertools.pairwise([*seen, outs])}
    assert gaps <= {outs // MEASURED_ROWS, -(-outs // MEASURED_ROWS)}


def test_some_rows_tell_the_error_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 32, generator=generator)
    result = rtn(weight, IntGrid(4, 16, True))
    inputs = torch.randn(50, 32, generator=generator)
    errors = inputs @ (weight - result.dequantize()).T
    expected = float(errors.square().sum() / (inputs @ weight.T).square().sum())
    found = correlated_output_error(weight, result, inputs.T @ inputs / 50)
    assert found == pytest.approx(expected, rel=0.05)


def test_one_bit_more_is_worth_about_six_decibels() -> None:
    weight = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ratios = [sqnr_db(weight, rtn(weight, IntGrid(bits, -1, True))) for bits in (4, 5, 6, 7, 8)]
    steps = [after - before for before, after in itertools.pairwise(ratios)]
    assert all(5.5 < step < 6.5 for step in steps)
