"""KL divergence and perplexity, once more as Python sums, and where a closed form exists."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.eval.kld import kl_divergence, measure_kld


@dataclass
class BigramModel:
    """Logits depend on the present token alone: row ``token`` of a table [V, V]."""

    table: torch.Tensor

    def hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(token_ids, len(self.table)).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.table


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(value - top) for value in logits]
    total = math.fsum(exps)
    return [value / total for value in exps]


def twin_kl(base: list[float], candidate: list[float]) -> float:
    pairs = zip(probabilities(base), probabilities(candidate), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs)


logit_lists = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        *[st.lists(st.floats(-20, 20, width=32), min_size=size, max_size=size)] * 2
    )
)


@settings(max_examples=150, deadline=None)
@given(both=logit_lists)
def test_divergence_of_small_distributions(both: tuple[list[float], list[float]]) -> None:
    base, candidate = both
    found = float(kl_divergence(torch.tensor(base), torch.tensor(candidate)))
    assert found == pytest.approx(twin_kl(base, candidate), abs=1e-10)
    assert found > -1e-12


@pytest.mark.parametrize(("a", "b"), [(0.0, 1.0), (2.0, -1.0), (-3.0, 5.0), (10.0, 0.0)])
def test_closed_form_of_two_tokens(a: float, b: float) -> None:
    # Logits (a, 0) mean p = 1 / (1 + e^-a).
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = float(kl_divergence(torch.tensor([a, 0.0]), torch.tensor([b, 0.0])))
    assert found == pytest.approx(expected, abs=1e-10)


def test_the_base_is_what_is_averaged_over() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log(4/3) / 2, KL(q || p) = log 2 - H(q).
    even, uneven = torch.tensor([0.0, 0.0]), torch.tensor([1 / 4, 3 / 4]).log()
    assert float(kl_divergence(even, uneven)) == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    other = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert float(kl_divergence(uneven, even)) == pytest.approx(other, abs=1e-7)


def test_logits_too_large_to_exponentiate() -> None:
    base, candidate = torch.tensor([5000.0, 4999.0]), torch.tensor([5001.0, 4999.0])
    expected = twin_kl([1.0, 0.0], [2.0, 0.0])
    assert float(kl_divergence(base, candidate)) == pytest.approx(expected, abs=1e-10)


def test_a_small_divergence_survives_large_logits() -> None:
    # Half an ulp of float32 at 60 is 2e-6; the divergence itself is some 1e-9.
    base, candidate = [60.0, 59.0, 58.0], [60.0001, 59.0, 58.0]
    found = float(kl_divergence(torch.tensor(base), torch.tensor(candidate)))
    exact = twin_kl(torch.tensor(base).tolist(), torch.tensor(candidate).tolist())
    assert 5e-10 < exact < 5e-9
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("size", [2, 7, 64])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(size: int) -> None:
    model = BigramModel(torch.full((size, size), -3.0))
    windows = torch.randint(0, size, (3, 9), generator=torch.Generator().manual_seed(0))
    result = measure_kld(model, model, windows)
    assert result.base_perplexity == pytest.approx(size, rel=1e-12)
    assert result.candidate_perplexity == pytest.approx(size, rel=1e-12)
    assert (result.mean, result.median, result.p99) == (0, 0, 0)


def test_all_statistics() -> None:
    generator = torch.Generator().manual_seed(1)
    vocab, windows = 5, torch.randint(0, 5, (4, 8), generator=generator)
    base = torch.randn(vocab, vocab, generator=generator)
    candidate = base + torch.randn(vocab, vocab, generator=generator)
    divergences, agree, base_nll, candidate_nll = [], [], [], []
    for window in windows.tolist():
        for token, following in itertools.pairwise(window):
            p, q = base[token].tolist(), candidate[token].tolist()
            divergences.append(twin_kl(p, q))
            agree.append(p.index(max(p)) == q.index(max(q)))
            base_nll.append(-math.log(probabilities(p)[following]))
            candidate_nll.append(-math.log(probabilities(q)[following]))
    per_window = [statistics.fmean(divergences[i : i + 7]) for i in range(0, 28, 7)]
    place = 0.99 * 27
    low, high = sorted(divergences)[int(place) : int(place) + 2]

    result = measure_kld(BigramModel(base), BigramModel(candidate), windows)
    assert result.positions == 28
    close = {"rel": 1e-10, "abs": 1e-10}
    assert result.mean == pytest.approx(statistics.fmean(divergences), **close)
    assert result.standard_error == pytest.approx(statistics.stdev(per_window) / 2, **close)
    assert result.median == pytest.approx(statistics.median_low(divergences), **close)
    assert result.p99 == pytest.approx(low + (place % 1) * (high - low), **close)
    assert 0 < statistics.fmean(agree) < 1
    assert result.top1_agreement == pytest.approx(statistics.fmean(agree), **close)
    assert result.base_perplexity == pytest.approx(math.exp(statistics.fmean(base_nll)), **close)
    expected = math.exp(statistics.fmean(candidate_nll))
    assert result.candidate_perplexity == pytest.approx(expected, **close)
