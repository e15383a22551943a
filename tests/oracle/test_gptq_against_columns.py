"""GPTQ, once more as the textbook has it: float64, H inverted, one column after the other.

No order of storage, no blocks, no Cholesky factor: the inverse itself is kept, and each rounded
column is eliminated from it. Where a value lies within float32's noise of the middle between two
codes, either code is right, and all that follows in its row differs. So the codes are checked in
two ways: each must be nearest to the value that the textbook finds *after the same earlier codes*,
and the textbook left alone must end with the same error.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.gptq import GptqSettings, HessianFactor, factorize, gptq
from nybble.quant.grid import IntGrid, QuantizedWeight, minmax_scale, round_to_grid

TIE = 5e-4
"""How near the middle, in codes, a float32 value may be rounded to either side."""


@dataclass(frozen=True)
class Case:
    weight: torch.Tensor
    second_moment: torch.Tensor
    scales: torch.Tensor
    grid: IntGrid
    settings: GptqSettings


def make_case(
    seed: int,
    outs: int,
    ins: int,
    tokens: int,
    grid: IntGrid,
    settings: GptqSettings,
    dead: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator) * 0.02
    mix = torch.randn(max(ins // 4, 1), ins, generator=generator)
    inputs = torch.randn(tokens, len(mix), generator=generator) @ mix
    inputs += torch.randn(tokens, ins, generator=generator)
    inputs *= 10 ** torch.rand(ins, generator=generator)
    inputs[:, torch.randperm(ins, generator=generator)[:dead]] = 0
    moment = inputs.T @ inputs / tokens
    return Case(weight, moment, minmax_scale(weight, grid), grid, settings)


def damped(case: Case, damping: float) -> torch.Tensor:
    hessian = case.second_moment.double()
    diagonal = hessian.diagonal().clone()
    mean = diagonal[diagonal != 0].mean()
    diagonal[diagonal == 0] = mean
    return hessian - torch.diag(hessian.diagonal()) + torch.diag(diagonal + damping * mean)


def textbook(
    case: Case, damping: float, forced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] and the values [O, I], in codes, that they were rounded from.

    With ``forced`` codes these are taken in place of the nearest.
    """
    weight, hessian = case.weight.double(), damped(case, damping)
    inverse = torch.linalg.inv(hessian)
    power = hessian.diagonal().tolist()
    walk = list(range(len(power)))
    if case.settings.act_order:
        walk.sort(key=lambda column: -power[column])
    group_size = len(power) // case.scales.shape[1]
    codes, values = torch.zeros_like(weight), torch.zeros_like(weight)
    for column in walk:
        scale = case.scales[:, column // group_size].double()
        values[:, column] = weight[:, column] / scale
        nearest = values[:, column].round().clamp(case.grid.lowest, case.grid.highest)
        codes[:, column] = nearest if forced is None else forced[:, column].double()
        error = (weight[:, column] - codes[:, column] * scale) / inverse[column, column]
        weight -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, values


def power_of_errors(case: Case, hessian: torch.Tensor, codes: torch.Tensor) -> float:
    result = QuantizedWeight(codes.to(torch.int8), case.scales, case.grid)
    error = case.weight.double() - result.dequantize().double()
    return float(((error @ hessian) * error).sum())


def check(case: Case) -> HessianFactor:
    factor = factorize(case.second_moment, case.settings)
    result = gptq(case.weight, factor, case.scales, case.grid)
    _, values = textbook(case, factor.damping, result.codes)
    allowed = values.clamp(case.grid.lowest, case.grid.highest)
    assert float((result.codes - allowed).abs().max()) <= 0.5 + TIE
    assert result.scales is case.scales
    return factor


BITS = (2, 3, 4, 8)
SHAPES = [(1, 32, 32), (7, 64, 32), (40, 384, 128), (16, 384, 64), (24, 200, -1), (40, 128, -1)]


@pytest.mark.parametrize(
    ("bits", "signed", "act_order"), list(itertools.product(BITS, (True, False), (True, False)))
)
@pytest.mark.parametrize(("outs", "ins", "group_size"), SHAPES)
def test_every_code_is_the_nearest_after_those_before(
    outs: int, ins: int, group_size: int, bits: int, signed: bool, act_order: bool
) -> None:
    grid = IntGrid(bits, group_size, signed)
    case = make_case(bits, outs, ins, 2 * ins, grid, GptqSettings(act_order=act_order), dead=2)
    factor = check(case)
    assert (factor.dead, factor.damping_increases) == (2, 0)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_textbook_left_alone_ends_where_we_do(bits: int, act_order: bool) -> None:
    grid = IntGrid(bits, 64, True)
    case = make_case(bits, 40, 384, 800, grid, GptqSettings(act_order=act_order), dead=3)
    factor = factorize(case.second_moment, case.settings)
    ours = gptq(case.weight, factor, case.scales, grid).codes
    theirs, _ = textbook(case, factor.damping, None)
    assert float((ours != theirs).double().mean()) < 0.01
    hessian = damped(case, factor.damping)
    expected = power_of_errors(case, hessian, theirs)
    # One tie that float32 rounds otherwise sends all later columns another, equally good way.
    assert power_of_errors(case, hessian, ours) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bits", BITS)
def test_fewer_tokens_than_channels(bits: int) -> None:
    case = make_case(bits, 20, 256, 60, IntGrid(bits, 32, True), GptqSettings(), dead=5)
    assert int(torch.linalg.matrix_rank(case.second_moment.double(), rtol=1e-6)) <= 60
    factor = check(case)
    assert (factor.dead, factor.damping) == (5, 0.01)


CASES = st.builds(
    make_case,
    seed=st.integers(0, 2**20),
    outs=st.integers(1, 12),
    ins=st.sampled_from([32, 64, 96, 160]),
    tokens=st.integers(1, 200),
    grid=st.builds(IntGrid, st.integers(2, 8), st.sampled_from([1, 8, 32, -1]), st.booleans()),
    settings=st.builds(
        GptqSettings, st.sampled_from([0.005, 0.01, 0.1, 1.0]), st.booleans(), st.integers(1, 170)
    ),
)


@settings(max_examples=40, deadline=None)
@given(case=CASES)
def test_any_shape_and_setting(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("bits", BITS)
def test_beats_rounding_to_nearest_on_correlated_inputs(bits: int) -> None:
    grid = IntGrid(bits, 64, True)
    case = make_case(bits, 48, 256, 1000, grid, GptqSettings())
    factor = factorize(case.second_moment, case.settings)
    hessian = case.second_moment.double()
    ours = power_of_errors(case, hessian, gptq(case.weight, factor, case.scales, grid).codes)
    nearest = round_to_grid(case.weight, case.scales, grid).codes
    assert ours < 0.1 * power_of_errors(case, hessian, nearest)


def test_the_power_of_the_errors_is_that_of_the_steps() -> None:
    # Sum over columns of ((value - code) s / U_cc)^2 is the power of the errors under damped H.
    case = make_case(3, 6, 96, 200, IntGrid(4, 32, True), GptqSettings())
    factor = factorize(case.second_moment, case.settings)
    codes = gptq(case.weight, factor, case.scales, case.grid).codes
    _, values = textbook(case, factor.damping, codes)
    steps = (values - codes) * case.scales.double().repeat_interleave(32, dim=1)
    predicted = (steps[:, factor.order] / factor.upper.diagonal().double()).square().sum()
    power = power_of_errors(case, damped(case, factor.damping), codes)
    assert float(predicted) == pytest.approx(power, rel=1e-4)
