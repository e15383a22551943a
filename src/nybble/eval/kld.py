"""Exact KL divergence and perplexity of a checkpoint against its base, both in memory.

KL(base || candidate) in nats per position, over the full vocabulary, teacher-forced; log-softmax
in float64. The windows are those of the caller; each of n tokens scores n - 1 positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nybble.engine.load import LoadedModel


@dataclass(frozen=True)
class KldResult:
    """Statistics over positions; ``standard_error`` is that of the mean, from window means."""

    positions: int
    mean: float
    standard_error: float
    median: float
    p99: float
    top1_agreement: float
    """Share of positions where both models' most likely token is the same."""
    base_perplexity: float
    candidate_perplexity: float


def kl_divergence(base_logits: torch.Tensor, candidate_logits: torch.Tensor) -> torch.Tensor:
    """KL(base || candidate) in nats, [...] float64, of logits [..., V]."""
    base = base_logits.double().log_softmax(dim=-1)
    candidate = candidate_logits.double().log_softmax(dim=-1)
    return (base.exp() * (base - candidate)).sum(dim=-1)


@torch.no_grad()
def measure_kld(base: LoadedModel, candidate: LoadedModel, windows: torch.Tensor) -> KldResult:
    """Scores windows, int64 [R, T], one at a time."""
    divergences, agreements, base_nll, candidate_nll = [], [], [], []
    for window in windows:
        base_logits = base.logits(base.hidden(window[None]))[0, :-1]
        candidate_logits = candidate.logits(candidate.hidden(window[None]))[0, :-1]
        divergences.append(kl_divergence(base_logits, candidate_logits))
        agreements.append(base_logits.argmax(dim=-1) == candidate_logits.argmax(dim=-1))
        base_nll.append(_nll(base_logits, window[1:]))
        candidate_nll.append(_nll(candidate_logits, window[1:]))
    per_window = torch.stack(divergences)
    every = per_window.flatten()
    num_windows = len(per_window)
    spread = float(per_window.mean(dim=1).std()) if num_windows > 1 else math.nan
    return KldResult(
        positions=every.numel(),
        mean=float(every.mean()),
        standard_error=spread / math.sqrt(num_windows),
        median=float(every.median()),
        p99=float(every.quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        base_perplexity=math.exp(float(torch.cat(base_nll).mean())),
        candidate_perplexity=math.exp(float(torch.cat(candidate_nll).mean())),
    )


def _nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    log_probs = logits.double().log_softmax(dim=-1)
    return -log_probs.gather(-1, tokens[:, None]).squeeze(-1)
