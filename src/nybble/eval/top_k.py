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
    tail: torch.Tensor
    """float64 [P]: the probability of all other tokens, summed over these: taken from 1, a small
    one would be lost in the rounding of ``log_probs``."""
    token_log_probs: torch.Tensor
    """float64 [P]: of the text's own next tokens."""

    @property
    def coverage(self) -> float:
        """Mean over the positions of the probability of the K tokens together."""
        return 1 - float(self.tail.mean())


def top_k(base: Output, tokens: torch.Tensor, k: int, device: torch.device) -> TopK:
    """The k most likely tokens of each position; ``tokens``, int64 [P], are the next of each."""
    softmax = RunningSoftmax(tokens, device)
    wide = base.states.dtype if base.states.dtype == torch.float64 else torch.float32
    best = torch.full((len(tokens), k), -torch.inf, dtype=wide)
    ids = torch.zeros((len(tokens), k), dtype=torch.int32)
    outside = torch.zeros(len(tokens), dtype=torch.float64, device=device)
    for piece in pieces((base,), device):
        at, (logits,) = piece.positions, piece.logits
        weights, shrink = softmax.add(at, piece.start, logits)
        found = torch.arange(logits.shape[1], dtype=torch.int32, device=device) + piece.start
        merged = torch.cat([best[at].to(device), logits], dim=1)
        merged_ids = torch.cat([ids[at].to(device), found.expand(len(logits), -1)], dim=1)
        values, columns = merged.topk(k, dim=1)
        shares = torch.cat([(best[at].to(device) - values[:, :1]).exp(), weights], dim=1)
        dropped = shares.scatter_(1, columns, 0.0).sum(dim=1, dtype=torch.float64)
        outside[at] = outside[at] * shrink + dropped
        best[at], ids[at] = values.cpu(), merged_ids.gather(1, columns).cpu()
    # In two steps, since a normalizer rounded to float32 would be a common error of all of them.
    rounded = softmax.log_normalizer.to(wide)
    log_probs = best.sub_(rounded[:, None])
    log_probs.sub_((softmax.log_normalizer - rounded)[:, None].to(wide))
    return TopK(ids, log_probs, softmax.weighted_mean(outside), softmax.token_log_probs)


def score_against_top_k(
    reference: TopK, candidate: Output, tokens: torch.Tensor, num_windows: int, device: torch.device
) -> Scores:
    """Scores all positions by the truncated form; ``tokens`` as in ``top_k``."""
    softmax = RunningSoftmax(tokens, device)
    outside = torch.zeros(len(tokens), dtype=torch.float64, device=device)  # exp(c - peak), not K's
    expected = torch.zeros_like(outside)  # sum over the K of p c
    for piece in pieces((candidate,), device):
        at, (logits,) = piece.positions, piece.logits
        weights, shrink = softmax.add(at, piece.start, logits)
        columns = reference.ids[at].to(device).long() - piece.start
        here = (columns >= 0) & (columns < logits.shape[1])
        columns = columns.clamp(0, logits.shape[1] - 1)
        probs = reference.log_probs[at].to(device).double().exp() * here
        # Less itself is exactly zero, so that what is left is summed and not a difference of sums.
        weights.scatter_add_(1, columns, -(weights.gather(1, columns) * here))
        outside[at] = outside[at] * shrink + weights.sum(dim=1, dtype=torch.float64)
        expected[at] += (probs * logits.gather(1, columns).double()).sum(dim=1)
    log_probs = reference.log_probs.double()
    mass = log_probs.exp().sum(dim=1)
    entropy_part = (log_probs.exp() * log_probs).sum(dim=1)
    head = entropy_part - expected.cpu() + mass * softmax.log_normalizer
    tail, its_tail = reference.tail, softmax.weighted_mean(outside)
    rest = torch.where(tail > 0, tail * (tail / its_tail.clamp(min=_TINY)).log(), 0.0)
    return Scores(
        # Rounded probabilities do not add up to 1; what is amiss would count in full.
        kld=head + rest + (1 - mass - tail),
        tokens=tokens,
        base_log_probs=reference.token_log_probs,
        candidate_log_probs=softmax.token_log_probs,
        base_top=reference.ids[:, 0].long(),
        candidate_top=softmax.top,
        base_confidence=log_probs[:, 0].exp(),
        num_windows=num_windows,
    )


_TINY = 1e-38
"""For a candidate's tail that float32 cannot hold: never less than it, so a bound stays one."""
