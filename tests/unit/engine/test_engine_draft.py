from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.checkpoints import VOCAB
from support.moe_checkpoints import Moe, write_moe
from transformers import DynamicCache

from nybble.engine.load import LoadedModel, load_model

ROWS, TOKENS, STEPS = 2, 12, 4


def ids(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def drafted_by_an_engine(model: LoadedModel, token_ids: torch.Tensor, t: int) -> list[torch.Tensor]:
    """What is drafted once the trunk has seen tokens up to t and chosen token t + 1.

    The head first runs over all positions so far, then over one token at a time, its own last
    output in the place of the trunk's state and a cache of its own: entries [B, D].
    """
    head, embed, rotary = model.mtp, model.trunk.embed_tokens, model.trunk.rotary_emb
    assert head is not None
    embeds, cache = embed(token_ids), DynamicCache()

    def step(hidden: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
        positions = torch.arange(first, first + tokens.shape[1])[None]
        output = head(hidden, tokens, rotary(tokens, positions), None, cache)[:, -1:]
        assert isinstance(output, torch.Tensor)
        return output

    hidden = step(model.hidden(token_ids[:, : t + 1]), embeds[:, 1 : t + 2], 0)
    drafts = [hidden]
    for ahead in range(2, min(STEPS, TOKENS - 1 - t) + 1):
        hidden = step(hidden, embeds[:, t + ahead : t + ahead + 1], t + ahead - 1)
        drafts.append(hidden)
    return [draft[:, 0] for draft in drafts]


def check_against_an_engine(model: LoadedModel) -> None:
    drafts = model.drafts(model.hidden(ids()), ids(), STEPS)
    assert [draft.shape[1] for draft in drafts] == [TOKENS - step for step in range(1, STEPS + 1)]
    compared = 0
    for t in range(TOKENS - 1):
        for draft, expected in zip(drafts, drafted_by_an_engine(model, ids(), t), strict=False):
            assert torch.allclose(draft[:, t], expected, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared == sum(draft.shape[1] for draft in drafts)


def test_every_position_drafts_as_if_it_were_the_last(tiny_base: Path) -> None:
    check_against_an_engine(load_model(tiny_base))


def test_a_quantized_head_drafts_so_too(rtn_result: Path) -> None:
    check_against_an_engine(load_model(rtn_result))


def test_a_head_with_experts_drafts_so_too(tmp_path: Path) -> None:
    check_against_an_engine(load_model(write_moe(tmp_path / "moe", Moe())))


def test_steps_differ_from_each_other(tiny_base: Path) -> None:
    """No step is the one before it, moved by a position: each is of another kind of input."""
    model = load_model(tiny_base)
    drafts = model.drafts(model.hidden(ids()), ids(), STEPS)
    for earlier, later in pairwise(drafts):
        count = later.shape[1]
        assert not torch.allclose(earlier[:, 1 : 1 + count], later, atol=0.05)
        assert not torch.allclose(earlier[:, :count], later, atol=0.05)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_drafts_are_the_first_ones(tiny_base: Path, steps: int) -> None:
    model = load_model(tiny_base)
    all_of_them = model.drafts(model.hidden(ids()), ids(), STEPS)
    some = model.drafts(model.hidden(ids()), ids(), steps)
    assert len(some) == steps
    for one, other in zip(some, all_of_them, strict=False):
        assert torch.equal(one, other)


def test_a_draft_sees_no_later_token(make_tiny: Callable[..., Path]) -> None:
    model = load_model(make_tiny(seed=5))
    changed = ids()
    changed[:, 8:] = (changed[:, 8:] + 1) % VOCAB
    one, other = (model.drafts(model.hidden(tokens), tokens, STEPS) for tokens in (ids(), changed))
    for step, (before, after) in enumerate(zip(one, other, strict=True), start=1):
        last = 8 - step  # combines tokens up to 7
        assert torch.allclose(before[:, :last], after[:, :last], atol=1e-5)
        assert not torch.allclose(before[:, last], after[:, last], atol=0.05)
