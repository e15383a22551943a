"""KL divergence, exact and truncated, and every figure made of it, once more as Python sums."""

from __future__ import annotations

import math
import statistics as plain
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.outputs import CPU, output_of, pieces_of, scored

from nybble.eval.kld import kl_divergence
from nybble.eval.statistics import CONFIDENCE_EDGES, QUANTILES, statistics
from nybble.eval.top_k import score_against_top_k, top_k

CLOSE = {"rel": 1e-10, "abs": 1e-10}


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(value - top) for value in logits]
    total = math.fsum(exps)
    return [value / total for value in exps]


def twin_kl(base: list[float], candidate: list[float]) -> float:
    pairs = zip(probabilities(base), probabilities(candidate), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p)


def twin_truncated(base: list[float], candidate: list[float], kept: list[int]) -> float:
    p, q = probabilities(base), probabilities(candidate)
    rest = [v for v in range(len(p)) if v not in kept]
    assert max((p[v] for v in rest), default=0) <= min(p[v] for v in kept)
    inside = math.fsum(p[v] * math.log(p[v] / q[v]) for v in kept if p[v])
    tail, its_tail = math.fsum(p[v] for v in rest), math.fsum(q[v] for v in rest)
    return inside + (tail * math.log(tail / its_tail) if tail else 0)


logit_lists = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        *[st.lists(st.floats(-20, 20, width=32), min_size=size, max_size=size)] * 2
    )
)


def rows(*values: list[float]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([row], dtype=torch.float64) for row in values)


@settings(max_examples=150, deadline=None)
@given(both=logit_lists, size=st.integers(1, 7))
def test_divergence_of_small_distributions(
    both: tuple[list[float], list[float]], size: int
) -> None:
    base, candidate = rows(*both)
    with pieces_of(size, 3):
        found = float(scored(base, candidate).kld)
    assert found == pytest.approx(twin_kl(*both), abs=1e-10)
    assert found == pytest.approx(float(kl_divergence(base, candidate)), abs=1e-10)
    assert found > -1e-12


@settings(max_examples=150, deadline=None)
@given(both=logit_lists, k=st.integers(1, 6), size=st.integers(1, 7))
def test_truncated_divergence_of_small_distributions(
    both: tuple[list[float], list[float]], k: int, size: int
) -> None:
    (base, candidate), tokens = rows(*both), torch.tensor([0])
    k = min(k, len(both[0]))
    with pieces_of(size, 3):
        reference = top_k(output_of(base), tokens, k, CPU)
        found = score_against_top_k(reference, output_of(candidate), tokens, 1, CPU)
    kept = reference.ids[0].tolist()
    assert len(set(kept)) == k
    assert float(found.kld) == pytest.approx(twin_truncated(*both, kept), **CLOSE)


def test_the_base_is_what_is_averaged_over() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = log(4/3) / 2, KL(q || p) = log 2 - H(q).
    even, uneven = torch.tensor([[0.0, 0.0]]), torch.tensor([[1 / 4, 3 / 4]]).log()
    assert float(scored(even, uneven).kld) == pytest.approx(math.log(4 / 3) / 2, abs=1e-7)
    other = math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    assert float(scored(uneven, even).kld) == pytest.approx(other, abs=1e-7)


def test_logits_too_large_to_exponentiate() -> None:
    base, candidate = torch.tensor([[5000.0, 4999.0]]), torch.tensor([[5001.0, 4999.0]])
    expected = twin_kl([1.0, 0.0], [2.0, 0.0])
    assert float(scored(base, candidate).kld) == pytest.approx(expected, abs=1e-7)
    assert float(kl_divergence(base, candidate)) == pytest.approx(expected, abs=1e-10)


def test_a_small_divergence_survives_large_logits() -> None:
    # Half an ulp of float32 at 60 is 2e-6; the divergence itself is some 1e-9.
    base, candidate = [60.0, 59.0, 58.0], [60.0001, 59.0, 58.0]
    exact = twin_kl(torch.tensor(base).tolist(), torch.tensor(candidate).tolist())
    assert 5e-10 < exact < 5e-9
    found = float(kl_divergence(torch.tensor(base), torch.tensor(candidate)))
    assert found == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("windows", [1, 4])
def test_all_figures(windows: int) -> None:
    generator, vocab, per_window = torch.Generator().manual_seed(1), 5, 28 // windows
    tables = torch.randn(2, 28, vocab, generator=generator, dtype=torch.float64)
    base, candidate = 3 * tables[0], 3 * tables[0] + tables[1]
    tokens = torch.randint(vocab, (28,), generator=generator).tolist()
    found = statistics(scored(base, candidate, tokens, windows))

    positions = list(zip(base.tolist(), candidate.tolist(), strict=True))
    kld = [twin_kl(p, q) for p, q in positions]
    same = [float(p.index(max(p)) == q.index(max(q))) for p, q in positions]
    sure = [max(probabilities(p)) for p, _ in positions]
    of_token = [
        (probabilities(p)[t], probabilities(q)[t])
        for (p, q), t in zip(positions, tokens, strict=True)
    ]
    log_ratio = [math.log(p / q) for p, q in of_token]

    def error(values: list[float]) -> float:
        means = [plain.fmean(values[i : i + per_window]) for i in range(0, 28, per_window)]
        return plain.stdev(means) / windows**0.5 if windows > 1 else math.nan

    estimates = {"kld": kld, "same_top": same, "log_perplexity_ratio": log_ratio}
    for name, values in estimates.items():
        estimate = getattr(found, name)
        assert estimate.mean == pytest.approx(plain.fmean(values), **CLOSE), name
        assert estimate.standard_error == pytest.approx(error(values), nan_ok=True, **CLOSE), name
    for name, share in QUANTILES.items():
        place = share * 27
        low, high = (sorted(kld)[min(int(place) + step, 27)] for step in (0, 1))
        expected = low + (place % 1) * (high - low)
        assert found.quantiles[name] == pytest.approx(expected, **CLOSE), name
    assert found.max == pytest.approx(max(kld), **CLOSE)
    deltas = [q - p for p, q in of_token]
    assert found.mean_delta_p == pytest.approx(plain.fmean(deltas), **CLOSE)
    assert found.rms_delta_p == pytest.approx(plain.fmean(d * d for d in deltas) ** 0.5, **CLOSE)
    for perplexity, which in ((found.base_perplexity, 0), (found.candidate_perplexity, 1)):
        expected = math.exp(-plain.fmean(math.log(pair[which]) for pair in of_token))
        assert perplexity == pytest.approx(expected, **CLOSE)
    for bucket, (low, high) in zip(found.buckets, pairwise(CONFIDENCE_EDGES), strict=True):
        inside = [i for i, p in enumerate(sure) if low <= p < high]
        assert bucket.positions == len(inside)
        mean = plain.fmean(kld[i] for i in inside) if inside else math.nan
        assert bucket.mean_kld == pytest.approx(mean, nan_ok=True, **CLOSE)
        agree = plain.fmean(same[i] for i in inside) if inside else math.nan
        assert bucket.same_top == pytest.approx(agree, nan_ok=True, **CLOSE)
    order = sorted(range(28), key=lambda i: -kld[i])[:20]
    assert [(w.window, w.position) for w in found.worst] == [divmod(i, per_window) for i in order]
    for worst, index in zip(found.worst, order, strict=True):
        assert worst.kld == pytest.approx(kld[index], **CLOSE)
        p, q = positions[index]
        tops = (tokens[index], p.index(max(p)), q.index(max(q)))
        assert (worst.token, worst.base_top, worst.candidate_top) == tops
