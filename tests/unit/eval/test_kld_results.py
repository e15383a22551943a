from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from nybble.eval.kld import kl_divergence, measure_kld


@dataclass
class PositionModel:
    """Logits [T, V] that depend on the position alone; keeps what it was asked."""

    logits_TV: torch.Tensor

    def __post_init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        self.seen.append(token_ids.tolist())
        return self.logits_TV.expand(len(token_ids), -1, -1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_model_does_not_diverge_from_itself() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert kl_divergence(logits, logits).tolist() == [0, 0, 0]


def test_divergences_are_float64_and_keep_their_shape() -> None:
    logits = torch.randn(2, 3, 5).bfloat16()
    found = kl_divergence(logits, logits + 1)
    assert (found.dtype, found.shape) == (torch.float64, (2, 3))
    assert float(found.abs().max()) < 0.01


def test_adding_a_constant_to_logits_changes_nothing() -> None:
    logits = torch.tensor([1.0, 2.0, 4.0])
    assert float(kl_divergence(logits, logits + 8)) == pytest.approx(0, abs=1e-15)


def test_the_last_position_scores_nothing() -> None:
    same = [0.5, 0.5]
    base = PositionModel(logits_of(same, same, [0.9, 0.1]))
    candidate = PositionModel(logits_of(same, same, [0.1, 0.9]))
    result = measure_kld(base, candidate, torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert result.positions == 4
    assert result.mean == result.p99 == 0
    assert result.top1_agreement == 1


def test_a_position_predicts_the_token_after_it() -> None:
    # Sure of token 1 at position 0 and of token 0 at position 1: right, then wrong.
    base = PositionModel(logits_of([0.25, 0.75], [0.5, 0.5], [1.0, 1.0]))
    candidate = PositionModel(logits_of([0.5, 0.5], [0.25, 0.75], [1.0, 1.0]))
    result = measure_kld(base, candidate, torch.tensor([[0, 1, 0]]))
    assert result.base_perplexity == pytest.approx((0.75 * 0.5) ** -0.5, rel=1e-6)
    assert result.candidate_perplexity == pytest.approx((0.5 * 0.25) ** -0.5, rel=1e-6)


def test_agreement_is_of_the_likeliest_tokens() -> None:
    base = PositionModel(logits_of([0.6, 0.4], [0.6, 0.4], [0.4, 0.6], [0.4, 0.6], [1, 1]))
    candidate = PositionModel(logits_of([0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8], [1, 1]))
    result = measure_kld(base, candidate, torch.zeros(2, 5, dtype=torch.int64))
    assert result.top1_agreement == 0.75


def test_windows_are_scored_one_at_a_time() -> None:
    base, candidate = (PositionModel(torch.zeros(2, 4)) for _ in range(2))
    measure_kld(base, candidate, torch.tensor([[0, 1], [2, 3]]))
    assert base.seen == candidate.seen == [[[0, 1]], [[2, 3]]]


def test_one_window_has_no_standard_error() -> None:
    model = PositionModel(torch.zeros(4, 4))
    result = measure_kld(model, model, torch.tensor([[0, 1, 2, 3]]))
    assert result.positions == 3
    assert math.isnan(result.standard_error)
    two = measure_kld(model, model, torch.tensor([[0, 1, 2, 3]] * 2))
    assert two.standard_error == 0


def test_of_101_positions_the_99th_percentile_is_the_second_largest() -> None:
    slopes = torch.arange(102)[torch.randperm(102, generator=torch.Generator().manual_seed(0))]
    candidate = PositionModel(torch.stack([slopes / 50, torch.zeros(102)], dim=1))
    result = measure_kld(
        PositionModel(torch.zeros(102, 2)), candidate, torch.zeros(1, 102, dtype=torch.int64)
    )
    divergences = sorted(
        float(kl_divergence(torch.zeros(2), row)) for row in candidate.logits_TV[:-1]
    )
    assert len(set(divergences)) == result.positions == 101
    assert result.p99 == pytest.approx(divergences[99], abs=1e-12)
    assert result.median == pytest.approx(divergences[50], abs=1e-12)
