from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nybble.core.errors import CheckpointError
from nybble.eval.acceptance import AcceptanceResult, count_drafts, measure_acceptance


@pytest.mark.parametrize(
    ("matches", "counts"),
    [
        ([], (0, 0)),
        ([False], (1, 0)),
        ([True], (1, 1)),
        ([False] * 4, (4, 0)),
        ([True] * 4, (2, 2)),
        ([True] * 5, (3, 3)),
        ([True, False, True, True], (2, 2)),  # the False is never asked
        ([False, True, False, True], (3, 2)),
        ([True, True, False, False, True], (4, 2)),
    ],
)
def test_counts_of_one_row(matches: list[bool], counts: tuple[int, int]) -> None:
    assert count_drafts(matches, 0) == counts


def test_positions_before_the_start_are_the_prompt() -> None:
    assert count_drafts([True, True, True, False, True], 3) == (2, 1)
    assert count_drafts([True, True], 2) == (0, 0)


def test_the_rate() -> None:
    assert AcceptanceResult(drafts=8, accepted=6).rate == 0.75


def test_a_checkpoint_without_a_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no MTP head"):
        measure_acceptance(SimpleNamespace(mtp=None), torch.zeros(1, 2, dtype=torch.int64), 4)
