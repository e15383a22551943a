"""What is reported of scored positions; llama.cpp's ``llama-perplexity --kl-divergence`` has most
of these figures, and the same meaning of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from nybble.eval.kld import Scores

QUANTILES = {"median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
"""Of the buckets by the base's probability of its most likely token."""
NUM_WORST = 20


@dataclass(frozen=True)
class Estimate:
    """A mean over positions and its standard error, from the means of the windows.

    Positions of one window are not independent, windows are. NaN error with one window.
    """

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Bucket:
    """The positions where the base is about equally sure of itself."""

    low: float
    high: float
    positions: int
    mean_kld: float
    """NaN without positions."""
    same_top: float


@dataclass(frozen=True)
class Worst:
    """One of the positions with the largest divergence."""

    window: int
    position: int
    """Of the last token that the models were given, in its window."""
    kld: float
    token: int
    """The text's own next token."""
    base_top: int
    candidate_top: int


@dataclass(frozen=True)
class KldStatistics:
    """One checkpoint against its base. KLD in nats, shares from 0 to 1."""

    positions: int
    windows: int
    kld: Estimate
    quantiles: dict[str, float]
    """Of the KLD; names as in ``QUANTILES``."""
    max: float
    same_top: Estimate
    """Share of positions where both models' most likely token is the same."""
    rms_delta_p: float
    """Root mean square change of the probability of the text's own token."""
    mean_delta_p: float
    base_perplexity: float
    candidate_perplexity: float
    log_perplexity_ratio: Estimate
    """ln(candidate's / base's)."""
    buckets: tuple[Bucket, ...]
    worst: tuple[Worst, ...]
    """The largest divergences, the largest first."""


@dataclass(frozen=True)
class NoiseFloor:
    """The base against itself, computed in another way: what a KLD can not tell from nothing."""

    how: str
    """What was different."""
    mean: float
    median: float
    p99: float
    same_top: float


def statistics(scores: Scores) -> KldStatistics:
    """All figures of one checkpoint's scores."""
    kld = scores.kld
    same_top = (scores.base_top == scores.candidate_top).double()
    delta_p = scores.candidate_log_probs.exp() - scores.base_log_probs.exp()
    return KldStatistics(
        positions=len(kld),
        windows=scores.num_windows,
        kld=_estimate(kld, scores.num_windows),
        quantiles={name: float(kld.quantile(share)) for name, share in QUANTILES.items()},
        max=float(kld.max()),
        same_top=_estimate(same_top, scores.num_windows),
        rms_delta_p=math.sqrt(float(delta_p.square().mean())),
        mean_delta_p=float(delta_p.mean()),
        base_perplexity=math.exp(-float(scores.base_log_probs.mean())),
        candidate_perplexity=math.exp(-float(scores.candidate_log_probs.mean())),
        log_perplexity_ratio=_estimate(
            scores.base_log_probs - scores.candidate_log_probs, scores.num_windows
        ),
        buckets=tuple(_bucket(scores, same_top, *edges) for edges in pairwise(CONFIDENCE_EDGES)),
        worst=_worst(scores),
    )


def noise_floor(how: str, scores: Scores) -> NoiseFloor:
    """What scores of the base against itself amount to; ``how`` says what was different."""
    return NoiseFloor(
        how=how,
        mean=float(scores.kld.mean()),
        median=float(scores.kld.quantile(0.5)),
        p99=float(scores.kld.quantile(0.99)),
        same_top=float((scores.base_top == scores.candidate_top).double().mean()),
    )


def _estimate(values: torch.Tensor, num_windows: int) -> Estimate:
    means = values.view(num_windows, -1).mean(dim=1)
    spread = float(means.std()) if num_windows > 1 else math.nan
    return Estimate(float(values.mean()), spread / math.sqrt(num_windows))


def _bucket(scores: Scores, same_top: torch.Tensor, low: float, high: float) -> Bucket:
    confidence = scores.base_confidence
    # The last bucket holds certainty itself.
    inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
    return Bucket(
        low=low,
        high=high,
        positions=int(inside.sum()),
        mean_kld=float(scores.kld[inside].mean()),
        same_top=float(same_top[inside].mean()),
    )


def _worst(scores: Scores) -> tuple[Worst, ...]:
    per_window = len(scores.kld) // scores.num_windows
    _, indices = scores.kld.topk(min(NUM_WORST, len(scores.kld)))
    return tuple(
        Worst(
            window=index // per_window,
            position=index % per_window,
            kld=float(scores.kld[index]),
            token=int(scores.tokens[index]),
            base_top=int(scores.base_top[index]),
            candidate_top=int(scores.candidate_top[index]),
        )
        for index in indices.tolist()
    )
