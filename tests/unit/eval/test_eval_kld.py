from __future__ import annotations

import math

import pytest
import torch
from support.outputs import pieces_of, scored

from nybble.eval.kld import kl_divergence

SIZES = [(1, 1), (2, 3), (64, 2), (8192, 64)]


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def geometric(ratio: float, count: int) -> torch.Tensor:
    """Logits of p_v proportional to ratio^v."""
    return torch.arange(count, dtype=torch.float64) * math.log(ratio)


def geometric_divergence(r: float, s: float, count: int) -> float:
    """Closed form of KL between two of them: E_r[v] ln(r / s) - ln Z_r + ln Z_s."""
    z_r, z_s = ((1 - x**count) / (1 - x) for x in (r, s))
    mean = r / (1 - r) - count * r**count / (1 - r**count)
    return mean * math.log(r / s) - math.log(z_r) + math.log(z_s)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("r", "s"), [(0.9, 0.99), (0.99, 0.9), (1.01, 0.999), (0.5, 0.500001)])
def test_closed_form_of_geometric_distributions(r: float, s: float, sizes: tuple[int, int]) -> None:
    count = 300
    with pieces_of(*sizes):
        scores = scored(geometric(r, count)[None], geometric(s, count)[None])
    assert float(scores.kld) == pytest.approx(geometric_divergence(r, s, count), abs=1e-10)


@pytest.mark.parametrize("sizes", SIZES)
def test_closed_form_of_powers_of_two(sizes: tuple[int, int]) -> None:
    p, q = [1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    with pieces_of(*sizes):
        there = scored(logs(p, q, p) + 700, logs(q, p, p) - 700)
    first = 1 * 0.5 * 2 + 0.25 * 1 - 0.125 * 1 - 0.125 * 2
    second = 0.125 * -2 + 0.125 * -1 + 0.25 * 1 + 0.5 * 2
    expected = [first * math.log(2), second * math.log(2), 0]
    assert there.kld.tolist() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (2.0, -1.0), (-3.0, 5.0), (10.0, 0.0)])
def test_closed_form_of_two_tokens(a: float, b: float) -> None:
    # Logits (a, 0) mean p = 1 / (1 + e^-a).
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    base, candidate = (torch.tensor([[x, 0.0]], dtype=torch.float64) for x in (a, b))
    assert float(scored(base, candidate).kld) == pytest.approx(expected, abs=1e-10)
    assert float(kl_divergence(base, candidate)) == pytest.approx(expected, abs=1e-10)


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits).tolist() == [0, 0, 0]
    with pieces_of(8, 2):
        scores = scored(logits, logits)
    assert scores.kld.tolist() == [0, 0, 0]
    assert torch.equal(scores.base_top, scores.candidate_top)
    assert torch.equal(scores.base_log_probs, scores.candidate_log_probs)


def test_divergences_are_float64_and_keep_their_shape() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = kl_divergence(logits, logits + 1)
    assert (found.dtype, found.shape) == (torch.float64, (2, 3))
    assert float(found.abs().max()) < 0.01


def test_what_else_is_found_at_a_position() -> None:
    base, candidate = logs([0.25, 0.75], [0.6, 0.4]), logs([0.5, 0.5], [0.1, 0.9])
    scores = scored(base, candidate, tokens=[1, 0], windows=2)
    assert scores.tokens.tolist() == [1, 0]
    assert scores.base_log_probs.exp().tolist() == pytest.approx([0.75, 0.6], abs=1e-12)
    assert scores.candidate_log_probs.exp().tolist() == pytest.approx([0.5, 0.1], abs=1e-12)
    assert scores.base_top.tolist() == [1, 0]
    assert scores.candidate_top[1] == 1
    assert scores.base_confidence.tolist() == pytest.approx([0.75, 0.6], abs=1e-12)
    assert scores.num_windows == 2
