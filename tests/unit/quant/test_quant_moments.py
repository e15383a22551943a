from __future__ import annotations

import pytest
import torch

from nybble.core.errors import QuantizationError
from nybble.quant import moments as module
from nybble.quant.moments import InputMoments, full_float32_products

CPU = torch.device("cpu")


def sample(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, channels, generator=generator)


@pytest.mark.parametrize("strip", [1, 5, 16, 17, 1024])
def test_the_mean_of_all_products(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP", strip)
    inputs = sample(60, 17)
    moments = InputMoments(17, CPU, full=True)
    for part in inputs.split([1, 20, 39]):
        moments.add(part)
    rows = inputs.double()
    expected = torch.zeros(17, 17, dtype=torch.float64)
    for row in rows:
        expected += torch.outer(row, row) / 60
    found = moments.second_moment()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, found.T)
    assert moments.tokens == 60
    diagonal = InputMoments(17, CPU, full=False)
    diagonal.add(inputs)
    torch.testing.assert_close(diagonal.mean_square(), moments.mean_square())
    assert torch.equal(moments.mean_square(), found.diagonal())


def test_what_is_returned_is_no_view_of_the_sums() -> None:
    moments = InputMoments(4, CPU, full=True)
    moments.add(sample(10, 4))
    first = moments.second_moment()
    again = first.clone()
    moments.add(sample(10, 4, seed=1))
    assert torch.equal(first, again)
    assert not torch.equal(moments.second_moment(), first)


@pytest.mark.parametrize("full", [True, False])
def test_every_leading_dimension_counts_tokens(full: bool) -> None:
    batch = sample(24, 6).view(2, 3, 4, 6)
    moments, flat = InputMoments(6, CPU, full), InputMoments(6, CPU, full)
    moments.add(batch.transpose(0, 1))
    moments.add(sample(1, 6, seed=1)[0])
    flat.add(torch.cat([batch.reshape(-1, 6), sample(1, 6, seed=1)]))
    assert moments.tokens == flat.tokens == 25
    torch.testing.assert_close(moments.mean_square(), flat.mean_square())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 300.0), (torch.bfloat16, 2.0**60)])
def test_squares_that_the_inputs_type_cannot_hold(
    full: bool, dtype: torch.dtype, value: float
) -> None:
    moments = InputMoments(3, CPU, full)
    moments.add(torch.full((50, 3), value, dtype=dtype))
    assert moments.mean_square().tolist() == [value**2] * 3


def test_many_small_bfloat16_terms_are_not_lost() -> None:
    # In bfloat16 a sum stops growing at 256 times its terms.
    moments = InputMoments(2, CPU, full=True)
    for _ in range(40):
        moments.add(torch.ones(100, 2, dtype=torch.bfloat16))
    assert moments.sums[0].tolist() == [4000.0, 4000.0]


@pytest.mark.parametrize("full", [True, False])
def test_parts_counted_one_by_one_add_up(full: bool) -> None:
    whole, parts = (InputMoments(5, CPU, full) for _ in range(2))
    inputs = sample(30, 5)
    whole.add(inputs)
    parts.add(inputs[:8])
    parts.add(inputs[8:])
    assert parts.tokens == whole.tokens
    torch.testing.assert_close(parts.mean_square(), whole.mean_square())
    if full:
        torch.testing.assert_close(parts.second_moment(), whole.second_moment())


@pytest.mark.parametrize("full", [True, False])
def test_without_tokens_there_is_no_mean(full: bool) -> None:
    moments = InputMoments(7, CPU, full)
    moments.add(torch.empty(0, 7))
    with pytest.raises(QuantizationError, match=r"no calibration token reached .* 7 channels"):
        moments.mean_square()
    if full:
        with pytest.raises(QuantizationError, match="no calibration token"):
            moments.second_moment()


def test_a_low_precision_of_the_process_is_not_ours() -> None:
    # 257 needs 9 bits; where the CPU multiplies in bfloat16, it becomes 256.
    moments = InputMoments(256, CPU, full=True)
    try:
        torch.set_float32_matmul_precision("medium")
        moments.add(torch.full((256, 256), 257.0))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert bool((moments.second_moment() == 257.0**2).all())


def test_precision_is_put_back_after_an_error() -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    with pytest.raises(KeyError), full_float32_products():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        raise KeyError
    assert [backend.fp32_precision for backend in backends] == before
