from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nybble.core.errors import CheckpointError
from nybble.eval.acceptance import AcceptanceResult, count_steps, measure_acceptance
from nybble.eval.drafts import Acceptance, acceptance


def one_row(*right: list[bool]) -> torch.Tensor:
    """[1, P, n] of what is right at each position."""
    return torch.tensor([right], dtype=torch.bool)


@pytest.mark.parametrize(
    ("matches", "steps", "accepted"),
    [
        ([False], 1, 0),
        ([True], 1, 1),
        ([False] * 4, 4, 0),
        ([True] * 4, 2, 2),
        ([True] * 5, 3, 3),
        ([True, False, True, True], 2, 2),  # the False is never asked
        ([False, True, False, True], 3, 2),
        ([True, True, False, False, True], 4, 2),
    ],
)
def test_one_draft_a_step(matches: list[bool], steps: int, accepted: int) -> None:
    right = one_row(*([match] for match in matches))
    assert count_steps(right, 0) == AcceptanceResult(steps, (accepted,))


def test_only_drafts_right_in_a_row_are_accepted() -> None:
    # Worth 1 + 0, then 1 + 1 (its third draft is right for nothing), then 1 + 3.
    right = one_row(
        [False, True, True],
        [True, False, True],
        [True, True, True],  # passed over
        [True, True, True],
        *[[True, True, True]] * 3,  # passed over
        [True, True, False],
    )
    assert count_steps(right, 0) == AcceptanceResult(4, (3, 2, 1))


def test_positions_before_the_start_are_the_prompt() -> None:
    right = one_row([True], [True], [True], [False], [True])
    assert count_steps(right, 3) == AcceptanceResult(2, (1,))
    assert count_steps(right, 5) == AcceptanceResult(0, (0,))


def test_rows_are_walked_one_by_one_and_counted_together() -> None:
    right = torch.cat([one_row([True], [True], [True]), one_row([False], [True], [True])])
    assert count_steps(right, 0) == AcceptanceResult(4, (3,))


def test_rates_and_what_a_step_is_worth() -> None:
    result = AcceptanceResult(steps=8, accepted=(6, 4, 1))
    assert result.rates == (0.75, 0.5, 0.125)
    assert result.tokens_per_step == 2.375


def test_without_steps_there_is_no_rate() -> None:
    result = AcceptanceResult(steps=0, accepted=(0, 0))
    assert all(math.isnan(rate) for rate in result.rates)
    assert math.isnan(result.tokens_per_step)


def test_a_checkpoint_without_a_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no MTP head"):
        measure_acceptance(SimpleNamespace(mtp=None), torch.zeros(1, 2, dtype=torch.int64), 4)


def test_figures_of_given_text_are_of_drafts_in_a_row() -> None:
    accepted = torch.tensor(
        [
            [[1, 1], [1, 0], [0, 1], [0, 0]],  # 2 of 4, then 1 of 4: the 0, 1 is not in a row
            [[1, 1], [1, 1], [1, 1], [1, 0]],
        ],
        dtype=torch.bool,
    )
    found = acceptance(accepted)
    assert found.rates == (0.75, 0.5)
    # Windows 0.5 and 1, then 0.25 and 0.75: standard deviation sqrt(2) / 4, over sqrt(2).
    assert found.standard_errors == pytest.approx((0.25, 0.25))
    assert found.tokens_per_step == 2.25


def test_probabilities_multiply() -> None:
    found = acceptance(torch.tensor([[[0.5, 0.5]], [[1.0, 0.25]]], dtype=torch.float64))
    assert found.rates == (0.75, 0.25)


def test_figures_of_one_window_have_no_standard_error() -> None:
    found = acceptance(torch.ones(1, 3, 2, dtype=torch.bool))
    assert found.rates == (1, 1)
    assert all(math.isnan(error) for error in found.standard_errors)


def test_a_head_that_is_always_wrong_is_worth_a_token_a_step() -> None:
    assert Acceptance((0.0, 0.0), (0.0, 0.0)).tokens_per_step == 1
