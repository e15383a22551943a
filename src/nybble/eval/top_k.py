"""KL divergence from the base's K most likely tokens alone: small enough to publish.

The reference keeps each position's K most likely tokens and their probabilities p. A candidate is
evaluated over its whole vocabulary, so its probabilities q of these tokens are exact; everything
else falls into one bucket:

    sum_{v in K} p_v ln(p_v / q_v) + (1 - C_p) ln((1 - C_p) / (1 - C_q)),   C = mass of the K tokens

By the log-sum inequality this is never more than the full divergence, and never negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.eval.head_pass import Output, RunningSoftmax, pieces
from nybble.eval.kld import Scores


@dataclass(frozen=True)
class TopK:
    """A base's predictions at every position, truncated."""

    ids: torch.Tensor
    """int32 [P, K], the most likely first."""
    log_probs: torch.Tensor
    """[P, K], float32 (or float64, of a base in float64)."""
    token_log_probs: torch.Tensor
    """float64 [P]: of the text's own next tokens."""

    @property
    def mass(self) -> torch.Tensor:
        """float64 [P]: the probability of the K tokens together."""
        return self.log_probs.double().exp().sum(dim=1).clamp(max=1.0)

    @property
    def coverage(self) -> float:
        """Mean of the mass over the positions."""
        return float(self.mass.mean())


def top_k(base: Output, tokens: torch.Tensor, k: int, device: torch.device) -> TopK:
    """The k most likely tokens of each position; ``tokens``, int64 [P], are the next of each."""
    softmax = RunningSoftmax(tokens, device)
    wide = base.states.dtype if base.states.dtype == torch.float64 else torch.float32
    best = torch.full((len(tokens), k), -torch.inf, dtype=wide)
    ids = torch.zeros((len(tokens), k), dtype=torch.int32)
    for piece in pieces((base,), device):
        at, (logits,) = piece.positions, piece.logits
        softmax.add(at, piece.start, logits)
        found = torch.arange(logits.shape[1], dtype=torch.int32, device=device) + piece.start
        merged = torch.cat([best[at].to(device), logits], dim=1)
        merged_ids = torch.cat([ids[at].to(device), found.expand(len(logits), -1)], dim=1)
        values, columns = merged.topk(k, dim=1)
        best[at], ids[at] = values.cpu(), merged_ids.gather(1, columns).cpu()
    log_probs = best - softmax.log_normalizer[:, None].to(wide)
    return TopK(ids, log_probs, softmax.token_log_probs)


def score_against_top_k(
    reference: TopK, candidate: Output, tokens: torch.Tensor, num_windows: int, device: torch.device
) -> Scores:
    """Scores all positions by the truncated form; ``tokens`` as in ``top_k``."""
    softmax = RunningSoftmax(tokens, device)
    inside = torch.zeros(len(tokens), dtype=torch.float64, device=device)  # of the K, exp(c - peak)
    expected = torch.zeros_like(inside)  # sum over the K of p c
    for piece in pieces((candidate,), device):
        at, (logits,) = piece.positions, piece.logits
        weights, shrink = softmax.add(at, piece.start, logits)
        columns = reference.ids[at].to(device).long() - piece.start
        here = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1)
        probs = reference.log_probs[at].to(device).double().exp() * here
        inside[at] = inside[at] * shrink + (weights.gather(1, columns) * here).double().sum(dim=1)
        expected[at] += (probs * logits.gather(1, columns).double()).sum(dim=1)
    mass, log_probs = reference.mass, reference.log_probs.double()
    entropy_part = (log_probs.exp() * log_probs).sum(dim=1)
    head = entropy_part - expected.cpu() + log_probs.exp().sum(dim=1) * softmax.log_normalizer
    tail, its_tail = 1 - mass, 1 - softmax.weighted_mean(inside)
    rest = torch.where(tail > 0, tail * (tail / its_tail.clamp(min=_TINY)).log(), 0.0)
    return Scores(
        kld=head + rest,
        tokens=tokens,
        base_log_probs=reference.token_log_probs,
        candidate_log_probs=softmax.token_log_probs,
        base_top=reference.ids[:, 0].long(),
        candidate_top=softmax.top,
        base_confidence=log_probs[:, 0].exp(),
        num_windows=num_windows,
    )


_TINY = 1e-300
"""A candidate's tail that is lost in rounding is not a probability of zero."""
