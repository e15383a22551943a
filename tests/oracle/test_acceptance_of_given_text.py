"""Streamed drafts on given text, against plain sums over what the resident model says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB, read_weights, write_weights
from support.outputs import pieces_of

from nybble.core.errors import CheckpointError
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.drafts import DraftScores, acceptance, score_drafts

CPU = torch.device("cpu")
ROWS, TOKENS = 3, 14


def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))


def streamed(folder: Path, num_drafts: int, rows_per_pass: int = 8) -> DraftScores:
    with ModelWeights(folder) as weights:
        how = Arithmetic(CPU, rows_per_pass=rows_per_pass)
        return score_drafts(weights, ids(), how, num_drafts)


def slowly(model: LoadedModel, num_drafts: int) -> tuple[list[object], list[object]]:
    """[R][P][n]: is the draft the trunk's choice; how often does sampling accept it."""
    hidden = model.hidden(ids())
    trunk = model.logits(hidden).double().softmax(dim=-1).tolist()
    heads = [
        model.logits(draft).double().softmax(dim=-1).tolist()
        for draft in model.drafts(hidden, ids(), num_drafts)
    ]
    greedy: list[object] = []
    sampled: list[object] = []
    for row in range(ROWS):
        pairs = [
            [(trunk[row][t + step], heads[step - 1][row][t]) for step in range(1, num_drafts + 1)]
            for t in range(TOKENS - num_drafts)
        ]
        greedy.append([[p.index(max(p)) == q.index(max(q)) for p, q in steps] for steps in pairs])
        sampled.append([[sum(map(min, p, q)) for p, q in steps] for steps in pairs])
    return greedy, sampled


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_drafts_of_every_position(tiny_base: Path, num_drafts: int) -> None:
    found = streamed(tiny_base, num_drafts)
    greedy, sampled = slowly(load_model(tiny_base), num_drafts)
    assert found.greedy.shape == (ROWS, TOKENS - num_drafts, num_drafts)
    assert found.greedy.tolist() == greedy
    assert torch.allclose(found.sampled, torch.tensor(sampled).double(), rtol=0, atol=1e-5)
    assert 0.05 < float(found.sampled.mean()) < 0.9
    assert len(found.sampled.unique()) == found.sampled.numel()


def test_drafts_of_a_quantized_checkpoint(rtn_result: Path) -> None:
    found = streamed(rtn_result, 3)
    greedy, sampled = slowly(load_model(rtn_result), 3)
    assert found.greedy.tolist() == greedy
    assert torch.allclose(found.sampled, torch.tensor(sampled).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows_per_pass", [1, 2])
def test_passes_and_pieces_change_nothing_but_rounding(tiny_base: Path, rows_per_pass: int) -> None:
    whole = streamed(tiny_base, 3)
    with pieces_of(96, 5):
        found = streamed(tiny_base, 3, rows_per_pass)
    assert torch.equal(found.greedy, whole.greedy)
    assert torch.allclose(found.sampled, whole.sampled, rtol=0, atol=1e-6)


def test_a_head_that_predicts_as_the_trunk_is_always_accepted(
    tiny_base: Path, make_tiny: Callable[..., Path]
) -> None:
    """With an output head of zeros both distributions are even."""
    folder, weights = make_tiny("even"), read_weights(tiny_base)
    weights["lm_head.weight"].zero_()
    write_weights(folder, weights)
    with ModelWeights(folder) as opened:
        found = acceptance(score_drafts(opened, ids(), Arithmetic(CPU), 3).sampled)
    assert found.rates == pytest.approx((1, 1, 1), abs=1e-6)


def test_a_checkpoint_without_a_head_is_refused(make_tiny: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="has no MTP head"):
        streamed(make_tiny(mtp=False), 1)


def test_windows_without_room_are_refused(tiny_base: Path) -> None:
    streamed(tiny_base, TOKENS - 2)
    with pytest.raises(
        CheckpointError, match=rf"windows of {TOKENS} tokens .* {TOKENS - 1} drafts"
    ):
        streamed(tiny_base, TOKENS - 1)
