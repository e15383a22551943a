from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.outputs import CPU, output_of, pieces_of, scored

from nybble.eval.kld import Scores
from nybble.eval.top_k import TopK, score_against_top_k, top_k

VOCAB, POSITIONS = 40, 9
EVERY_K = [1, 3, 39, 40]


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(POSITIONS, VOCAB, generator=generator, dtype=torch.float64)


def truncated(base: torch.Tensor, candidate: torch.Tensor, k: int) -> tuple[TopK, Scores]:
    """The reference and its scores, in small pieces."""
    tokens = torch.arange(len(base)) % base.shape[1]
    with pieces_of(7, 4):
        reference = top_k(output_of(base), tokens, k, CPU)
        return reference, score_against_top_k(reference, output_of(candidate), tokens, 1, CPU)


@pytest.mark.parametrize("k", EVERY_K)
def test_the_most_likely_tokens_are_kept_in_order(k: int) -> None:
    base = logits(0)
    reference, _ = truncated(base, base, k)
    values, ids = base.log_softmax(dim=1).topk(k, dim=1)
    assert reference.ids.dtype == torch.int32
    assert reference.ids.tolist() == ids.tolist()
    assert torch.allclose(reference.log_probs, values, rtol=0, atol=1e-12)
    rest = base.softmax(dim=1).scatter(1, ids, 0).sum(dim=1)
    assert torch.allclose(reference.tail, rest, rtol=1e-12, atol=0)
    assert reference.coverage == pytest.approx(1 - float(rest.mean()), abs=1e-12)


def test_a_base_in_float32_is_kept_in_float32() -> None:
    reference = top_k(output_of(logits(0).float()), torch.zeros(POSITIONS).long(), 5, CPU)
    assert reference.log_probs.dtype == torch.float32


@pytest.mark.parametrize("k", EVERY_K)
def test_the_divergence_is_of_the_tokens_and_one_bucket(k: int) -> None:
    base, candidate = logits(1), logits(2)
    _, scores = truncated(base, candidate, k)
    p, q = base.softmax(dim=1), candidate.softmax(dim=1)
    ids = p.topk(k, dim=1).indices
    inside_p, inside_q = p.gather(1, ids), q.gather(1, ids)
    expected = (inside_p * (inside_p / inside_q).log()).sum(dim=1)
    if k < VOCAB:
        rest_p, rest_q = 1 - inside_p.sum(dim=1), 1 - inside_q.sum(dim=1)
        expected += rest_p * (rest_p / rest_q).log()
    assert torch.allclose(scores.kld, expected, rtol=0, atol=1e-10)


def test_all_other_figures_are_the_full_forms() -> None:
    base, candidate = logits(3), logits(4)
    tokens = (torch.arange(POSITIONS) % VOCAB).tolist()
    _, found = truncated(base, candidate, 2)
    full = scored(base, candidate, tokens)
    assert found.base_top.tolist() == full.base_top.tolist()
    assert found.candidate_top.tolist() == full.candidate_top.tolist()
    assert found.tokens.tolist() == tokens
    for name in ("base_log_probs", "candidate_log_probs", "base_confidence"):
        assert torch.allclose(getattr(found, name), getattr(full, name), rtol=0, atol=1e-12), name


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocab=st.integers(2, 40),
    share=st.floats(0.01, 1),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 5.0, 30.0]),
    change=st.sampled_from([1e-4, 0.1, 1.0, 10.0]),
)
def test_a_truncated_divergence_is_never_more_than_the_full_one(
    seed: int, vocab: int, share: float, scale: float, change: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, noise = torch.randn(2, 4, vocab, generator=generator, dtype=torch.float64)
    base *= scale
    candidate = base + change * noise
    _, found = truncated(base, candidate, max(1, round(share * vocab)))
    full = scored(base, candidate).kld
    assert bool((found.kld <= full + 1e-10).all())
    assert bool((found.kld >= -1e-10).all())


@pytest.mark.parametrize("gap", [0.0, 10.0, 20.0, 40.0, 120.0])
def test_rounding_to_float32_is_not_taken_for_a_tail(gap: float) -> None:
    """Nearly all of the mass is in the K tokens: the rest of 1 is less than float32 can hold."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(64, 300, generator=generator)
    base[:, :100] += gap
    candidate = base + 0.01 * torch.randn(64, 300, generator=generator)
    _, found = truncated(base, candidate, 100)
    _, exact = truncated(base.double(), candidate.double(), 100)
    assert float((found.kld - exact.kld).abs().max()) < 1e-7
    full = scored(base.double(), candidate.double()).kld
    assert bool((found.kld <= full + 1e-7).all())
