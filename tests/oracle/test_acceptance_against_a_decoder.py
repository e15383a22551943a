"""The acceptance count, against a speculative decoder that really drafts, verifies and keeps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from nybble.eval.acceptance import AcceptanceResult, count_drafts, measure_acceptance

Guess = Callable[[list[int]], int]


def decode(
    prompt: list[int], num_new: int, trunk: Guess, head: Guess
) -> tuple[list[int], int, int]:
    """The text and its (drafts, accepted) of a decoder with one draft token per step.

    A step has the text so far; the head drafts its next token; one pass of the trunk over text and
    draft yields the next token and, if that equals the draft, the one after as well.
    """
    text = [*prompt, trunk(prompt)]
    drafts = accepted = 0
    while len(text) < len(prompt) + num_new:
        draft = head(text)
        drafts += 1
        verified = trunk(text)
        bonus = trunk([*text, draft])
        text.append(verified)
        if draft == verified:
            accepted += 1
            if len(text) < len(prompt) + num_new:
                text.append(bonus)
    return text, drafts, accepted


def hashed(seed: int, vocab: int) -> Guess:
    return lambda text: hash((seed, *text)) % 1009 % vocab


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 4),
    prompt_length=st.integers(1, 5),
    num_new=st.integers(1, 20),
)
def test_count_of_one_row(seed: int, vocab: int, prompt_length: int, num_new: int) -> None:
    trunk, head = hashed(seed, vocab), hashed(seed + 1, vocab)
    prompt = [0] * prompt_length
    text, drafts, accepted = decode(prompt, num_new, trunk, head)
    plain = list(prompt)
    while len(plain) < len(text):
        plain.append(trunk(plain))
    assert text == plain  # drafting does not change greedy text
    # matches[t]: the draft made from text[: t + 2] is the text's token t + 2.
    matches = [head(plain[: t + 2]) == plain[t + 2] for t in range(len(plain) - 2)]
    assert count_drafts(matches, prompt_length - 1) == (drafts, accepted)


class ChainModel:
    """Next token: a table of the last; draft: a table of the last two. Hidden states are logits."""

    def __init__(self, following: torch.Tensor, drafts: torch.Tensor) -> None:
        self.arch = SimpleNamespace(
            text_config=Qwen3Config(
                vocab_size=8,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                intermediate_size=8,
            )
        )
        self.mtp = object()
        self.following, self.drafts = following, drafts

    def hidden(self, token_ids: torch.Tensor, cache: object = None) -> torch.Tensor:
        assert cache is None or token_ids.shape[1] >= 1
        return torch.nn.functional.one_hot(self.following[token_ids], len(self.following)).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def drafted(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        assert hidden.shape[1] == token_ids.shape[1]
        tokens = self.drafts[token_ids[:, :-1], token_ids[:, 1:]]
        return torch.nn.functional.one_hot(tokens, len(self.following)).float()


@pytest.mark.parametrize("seed", range(8))
def test_measured_counts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab, prompt_length, num_new = 5, 3, 17
    following = torch.randperm(vocab, generator=generator)
    right = following.expand(vocab, vocab)
    wrong = torch.randint(0, vocab, (vocab, vocab), generator=generator)
    drafts = torch.where(torch.rand(vocab, vocab, generator=generator) < 0.5, right, wrong)
    prompts = torch.randint(0, vocab, (4, prompt_length), generator=generator)
    counted = [
        decode(
            prompt,
            num_new,
            trunk=lambda text: int(following[text[-1]]),
            head=lambda text: int(drafts[text[-2], text[-1]]),
        )
        for prompt in prompts.tolist()
    ]
    result = measure_acceptance(ChainModel(following, drafts), prompts, num_new)
    assert result.drafts == sum(row[1] for row in counted)
    assert result.accepted == sum(row[2] for row in counted)


def test_a_head_that_is_always_right_saves_half_the_steps() -> None:
    following = torch.tensor([1, 2, 3, 0])
    model = ChainModel(following, following.expand(4, 4))
    result = measure_acceptance(model, torch.zeros(1, 2, dtype=torch.int64), 21)
    assert result == AcceptanceResult(drafts=10, accepted=10)
    assert result.rate == 1.0
