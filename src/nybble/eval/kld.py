"""Exact KL divergence of a model from its base, per position, over the full vocabulary.

KL(base || candidate) = sum_v p_v (log p_v - log q_v), in nats, teacher-forced: position t is
scored on the distribution of token t+1 given the window's true tokens up to t. With logits b, c
and log-normalisers B, C it is  sum_v p_v (b_v - c_v) - B + C, which needs one pass over the
vocabulary and no normalised probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.core.errors import CheckpointError
from nybble.eval.head_pass import Output, RunningSoftmax, pieces


@dataclass(frozen=True)
class Scores:
    """What was found at each scored position, [P] each; windows follow one another."""

    kld: torch.Tensor
    """float64, nats."""
    tokens: torch.Tensor
    """int64: the text's own next token."""
    base_log_probs: torch.Tensor
    """float64: of that token under the base."""
    candidate_log_probs: torch.Tensor
    base_top: torch.Tensor
    """int64: the base's most likely token."""
    candidate_top: torch.Tensor
    base_confidence: torch.Tensor
    """float64: the probability of the base's most likely token."""
    num_windows: int


def kl_divergence(base_logits: torch.Tensor, candidate_logits: torch.Tensor) -> torch.Tensor:
    """KL(base || candidate) in nats, [...] float64, of logits [..., V] held as a whole."""
    base = base_logits.double().log_softmax(dim=-1)
    candidate = candidate_logits.double().log_softmax(dim=-1)
    return (base.exp() * (base - candidate)).sum(dim=-1)


def score(
    base: Output, candidate: Output, tokens: torch.Tensor, num_windows: int, device: torch.device
) -> Scores:
    """Scores all positions; ``tokens``, int64 [P], are the next token of each.

    Raises CheckpointError for models of different vocabularies.
    """
    if candidate.vocab_size != base.vocab_size:
        raise CheckpointError(
            f"the checkpoint's output head has {candidate.vocab_size} rows, the base's "
            f"{base.vocab_size}: their distributions are not over the same tokens"
        )
    of_base, of_candidate = RunningSoftmax(tokens, device), RunningSoftmax(tokens, device)
    cross = torch.zeros(len(tokens), dtype=torch.float64, device=device)
    for piece in pieces((base, candidate), device):
        at, (base_logits, candidate_logits) = piece.positions, piece.logits
        weights, shrink = of_base.add(at, piece.start, base_logits)
        of_candidate.add(at, piece.start, candidate_logits)
        gaps = weights.mul_(base_logits.sub_(candidate_logits))
        cross[at] = cross[at] * shrink + gaps.sum(dim=-1, dtype=torch.float64)
    log_ratio = of_candidate.log_normalizer - of_base.log_normalizer
    return Scores(
        kld=of_base.weighted_mean(cross) + log_ratio,
        tokens=tokens,
        base_log_probs=of_base.token_log_probs,
        candidate_log_probs=of_candidate.token_log_probs,
        base_top=of_base.top,
        candidate_top=of_candidate.top,
        base_confidence=of_base.confidence,
        num_windows=num_windows,
    )
