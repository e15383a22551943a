from __future__ import annotations

import pytest
import torch

from nybble.core.errors import QuantizationError
from nybble.quant import gptq as module
from nybble.quant.gptq import GptqSettings, factorize, gptq
from nybble.quant.grid import IntGrid, minmax_scale, round_to_grid
from nybble.quant.metrics import correlated_output_error

GRID = IntGrid(4, 32, True)


def correlated(ins: int, tokens: int = 2000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(ins // 4, ins, generator=generator)
    inputs = torch.randn(tokens, len(mix), generator=generator) @ mix
    inputs += torch.randn(tokens, ins, generator=generator)
    inputs *= 10 ** torch.rand(ins, generator=generator)
    return inputs.T @ inputs / tokens


def random_weight(outs: int, ins: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed)) * 0.02


def with_least_eigenvalue(least: float) -> torch.Tensor:
    """A symmetric matrix [16, 16] with a mean diagonal of 1."""
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    values = torch.full((16,), (16 - least) / 15, dtype=torch.float64)
    values[0] = least
    matrix = orthogonal * values @ orthogonal.T
    return ((matrix + matrix.T) / 2).float()


# The factor


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("ins", [1, 2, 100, 300, 769])
def test_the_factor_is_that_of_the_inverse(ins: int, act_order: bool) -> None:
    moment = correlated(ins) if ins >= 4 else torch.eye(ins) * 3
    given = moment.clone()
    factor = factorize(moment, GptqSettings(act_order=act_order))
    assert torch.equal(moment, given)
    upper, order = factor.upper.double(), factor.order
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    hessian = moment.double()[order][:, order]
    hessian += torch.eye(ins) * 0.01 * hessian.diagonal().mean()
    torch.testing.assert_close(
        upper.T @ upper @ hessian, torch.eye(ins).double(), atol=2e-4, rtol=0
    )
    assert (factor.damping, factor.damping_increases, factor.dead) == (0.01, 0, 0)


def test_act_order_takes_strong_channels_first() -> None:
    moment = torch.diag(torch.tensor([2.0, 5.0, 1.0, 5.0, 3.0]))
    assert factorize(moment, GptqSettings()).order.tolist() == [1, 3, 4, 0, 2]
    plain = factorize(moment, GptqSettings(act_order=False))
    assert plain.order.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("least", "damping", "increases"), [(-0.005, 0.01, 0), (-0.03, 0.04, 2), (-0.5, 0.64, 6)]
)
def test_damping_doubles_until_it_is_enough(least: float, damping: float, increases: int) -> None:
    factor = factorize(with_least_eigenvalue(least), GptqSettings())
    assert factor.damping == pytest.approx(damping)
    assert factor.damping_increases == increases
    hessian = with_least_eigenvalue(least).double()[factor.order][:, factor.order]
    hessian += damping * hessian.diagonal().mean() * torch.eye(16)
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper @ hessian, torch.eye(16).double(), atol=1e-3, rtol=0)


def test_damping_beyond_the_mean_diagonal_is_an_error() -> None:
    with pytest.raises(QuantizationError, match=r"16 channels .* even with 0\.64 of its mean"):
        factorize(with_least_eigenvalue(-2.0), GptqSettings())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(3, 3), (2, 5)])
def test_a_second_moment_that_is_not_finite(value: float, place: tuple[int, int]) -> None:
    moment = correlated(8)
    moment[place] = value
    with pytest.raises(QuantizationError, match="8 channels is NaN or infinite"):
        factorize(moment, GptqSettings())


@pytest.mark.parametrize("settings", [{"damp": 0.0}, {"damp": 1.5}, {"block_size": 0}])
def test_unusable_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="unusable GPTQ settings"):
        GptqSettings(**settings)


# The walk


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uncorrelated_channels_are_rounded_to_nearest_by_their_groups_scale(
    bits: int, act_order: bool
) -> None:
    grid = IntGrid(bits, 32, True)
    weight = random_weight(20, 160)
    power = torch.rand(160, generator=torch.Generator().manual_seed(0)) ** 4
    factor = factorize(torch.diag(power), GptqSettings(act_order=act_order))
    scales = minmax_scale(weight, grid)
    nearest = round_to_grid(weight, scales, grid)
    assert torch.equal(gptq(weight, factor, scales, grid).codes, nearest.codes)


def test_dead_channels_are_rounded_to_nearest_and_change_nothing_else() -> None:
    weight, moment = random_weight(12, 128), correlated(128)
    dead = torch.tensor([0, 31, 77])
    alive = torch.ones(128, dtype=torch.bool)
    alive[dead] = False
    moment[dead], moment[:, dead] = 0, 0
    factor = factorize(moment, GptqSettings())
    assert factor.dead == 3
    grid = IntGrid(4, -1, True)
    scales = minmax_scale(weight, grid)
    codes = gptq(weight, factor, scales, grid).codes
    assert torch.equal(codes[:, dead], round_to_grid(weight, scales, grid).codes[:, dead])
    assert int(codes[:, dead].count_nonzero()) > 20
    without = factorize(moment[alive][:, alive], GptqSettings())
    alone = gptq(weight[:, alive], without, scales, grid).codes
    assert torch.equal(codes[:, alive], alone)


def test_an_input_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight = random_weight(5, 64)
    factor = factorize(torch.zeros(64, 64), GptqSettings())
    scales = minmax_scale(weight, GRID)
    assert factor.dead == 64
    nearest = round_to_grid(weight, scales, GRID).codes
    assert torch.equal(gptq(weight, factor, scales, GRID).codes, nearest)


@pytest.mark.parametrize("bits", [3, 4])
def test_correlated_inputs_see_less_error_than_from_nearest(bits: int) -> None:
    grid = IntGrid(bits, 64, True)
    weight, moment = random_weight(40, 256), correlated(256)
    scales = minmax_scale(weight, grid)
    ours = gptq(weight, factorize(moment, GptqSettings()), scales, grid)
    nearest = round_to_grid(weight, scales, grid)
    error = correlated_output_error(weight, ours, moment)
    assert error < 0.1 * correlated_output_error(weight, nearest, moment)
    # A stronger damping passes less of each error on.
    damped = gptq(weight, factorize(moment, GptqSettings(damp=1.0)), scales, grid)
    assert error < correlated_output_error(weight, damped, moment)


def test_the_order_of_channels_in_storage_does_not_matter() -> None:
    # With act_order and one scale for a row, shuffled channels are walked in the same order.
    grid = IntGrid(4, -1, True)
    weight, moment = random_weight(10, 96), correlated(96)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    scales = minmax_scale(weight, grid)
    codes = gptq(weight, factorize(moment, GptqSettings()), scales, grid).codes
    shuffled = factorize(moment[shuffle][:, shuffle], GptqSettings())
    found = gptq(weight[:, shuffle], shuffled, scales, grid).codes
    assert torch.equal(found, codes[:, shuffle])


@pytest.mark.parametrize("block_size", [1, 7, 64, 200, 1000])
def test_blocks_and_chunks_change_nothing(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = random_weight(30, 192), correlated(192)
    scales = minmax_scale(weight, GRID)
    expected = gptq(weight, factorize(moment, GptqSettings()), scales, GRID)
    monkeypatch.setattr(module, "_CPU_ROWS", 8)
    factor = factorize(moment, GptqSettings(block_size=block_size))
    found = gptq(weight, factor, scales, GRID)
    # Sums in another order: a value halfway between two codes may go either way.
    differs = (found.codes != expected.codes).any(dim=1)
    assert int(differs.sum()) <= 1


def test_stacked_weights_are_quantized_as_alone() -> None:
    first, second = random_weight(9, 128, seed=1), random_weight(14, 128, seed=2)
    factor = factorize(correlated(128), GptqSettings())
    stacked = torch.cat([first, second])
    together = gptq(stacked, factor, minmax_scale(stacked, GRID), GRID).codes
    for weight, codes in ((first, together[:9]), (second, together[9:])):
        alone = gptq(weight, factor, minmax_scale(weight, GRID), GRID).codes
        assert int((alone != codes).any(dim=1).sum()) <= 1


def test_a_bfloat16_weight_is_read_in_float32_and_left_alone() -> None:
    weight = random_weight(8, 64).bfloat16()
    given = weight.clone()
    factor = factorize(correlated(64), GptqSettings())
    scales = minmax_scale(weight, GRID)
    codes = gptq(weight, factor, scales, GRID).codes
    assert torch.equal(weight, given)
    assert torch.equal(codes, gptq(weight.float(), factor, scales, GRID).codes)
    assert codes.dtype == torch.int8
    assert codes.is_contiguous()
    assert int(codes.min()) == -8
    assert int(codes.max()) == 7


def test_a_weight_that_is_not_finite() -> None:
    weight = random_weight(8, 64)
    factor = factorize(correlated(64), GptqSettings())
    scales = minmax_scale(weight, GRID)
    weight[3, 5], weight[6, 1] = float("nan"), float("inf")
    with pytest.raises(QuantizationError, match="2 of the 512 weights"):
        gptq(weight, factor, scales, GRID)


def test_groups_that_do_not_divide_the_row() -> None:
    factor = factorize(correlated(40), GptqSettings())
    with pytest.raises(QuantizationError, match="no multiple of group size 32"):
        gptq(random_weight(2, 40), factor, torch.ones(2, 1), GRID)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_ends_with_the_same_error() -> None:
    weight, moment = random_weight(64, 256), correlated(256)
    scales = minmax_scale(weight, GRID)
    here = gptq(weight, factorize(moment, GptqSettings()), scales, GRID)
    factor = factorize(moment.cuda(), GptqSettings())
    there = gptq(weight.cuda(), factor, scales.cuda(), GRID)
    assert there.codes.is_cuda
    assert float((there.codes.cpu() != here.codes).double().mean()) < 0.05
    expected = correlated_output_error(weight, here, moment)
    found = correlated_output_error(weight.cuda(), there, moment.cuda())
    assert found == pytest.approx(expected, rel=0.02)
