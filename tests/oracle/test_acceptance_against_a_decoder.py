"""The acceptance count, against a speculative decoder that really drafts, verifies and keeps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config

from nybble.eval.acceptance import AcceptanceResult, count_steps, measure_acceptance

Trunk = Callable[[list[int]], int]
Head = Callable[[list[int], list[int]], int]
"""(the text when drafting began, what was drafted since) -> the next draft."""


def decode(
    prompt: list[int], num_new: int, num_drafts: int, trunk: Trunk, head: Head
) -> tuple[list[int], AcceptanceResult]:
    """The text, and counts, of a decoder that drafts ``num_drafts`` tokens a step.

    A step has the text so far. The head drafts tokens, each from those before; one pass of the
    trunk over text and drafts then says what really follows each of them. Drafts are kept up to
    the first that is wrong, in whose place the trunk's own token is put; after the last right one
    as well. It stops where the text no longer has room for all drafts of a step.
    """
    text, end = [*prompt, trunk(prompt)], len(prompt) + num_new
    steps, accepted = 0, [0] * num_drafts
    while len(text) + num_drafts <= end:
        steps += 1
        drafts: list[int] = []
        for _ in range(num_drafts):
            drafts.append(head(text, drafts))
        verified = [trunk([*text, *drafts[:count]]) for count in range(num_drafts + 1)]
        right = 0
        while right < num_drafts and drafts[right] == verified[right]:
            right += 1
        for position in range(right):
            accepted[position] += 1
        text += verified[: right + 1]
    return text[:end], AcceptanceResult(steps, tuple(accepted))


def hashed(seed: int, vocab: int) -> Callable[[list[int]], int]:
    return lambda text: hash((seed, *text)) % 1009 % vocab


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(1, 4),
    prompt_length=st.integers(1, 5),
    num_new=st.integers(1, 20),
    num_drafts=st.integers(1, 4),
)
def test_count_of_one_row(
    seed: int, vocab: int, prompt_length: int, num_new: int, num_drafts: int
) -> None:
    trunk, guess = hashed(seed, vocab), hashed(seed + 1, vocab)

    def head(text: list[int], drafts: list[int]) -> int:
        return guess([len(drafts), *text, *drafts])

    prompt = [0] * prompt_length
    text, counted = decode(prompt, num_new, num_drafts, trunk, head)
    plain = list(prompt)
    while len(plain) < prompt_length + num_new:
        plain.append(trunk(plain))
    assert text == plain[: len(text)]  # drafting does not change greedy text
    # right[t][j]: drafted once t + 2 tokens are there, and after j right drafts: token t + 2 + j.
    right = [
        [
            head(plain[: t + 2], plain[t + 2 : t + 2 + j]) == plain[t + 2 + j]
            for j in range(num_drafts)
        ]
        for t in range(len(plain) - 1 - num_drafts)
    ]
    shaped = torch.tensor(right, dtype=torch.bool).view(1, len(right), num_drafts)
    assert count_steps(shaped, prompt_length - 1) == counted


class ChainModel:
    """Next token: a table of the last; j-th draft: a table of its own of the last two tokens.

    Hidden states are logits.
    """

    def __init__(self, following: torch.Tensor, tables: list[torch.Tensor]) -> None:
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
        self.following, self.tables = following, tables

    def hidden(self, token_ids: torch.Tensor, cache: object = None) -> torch.Tensor:
        assert cache is None or token_ids.shape[1] >= 1
        return torch.nn.functional.one_hot(self.following[token_ids], len(self.following)).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def drafts(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, steps: int
    ) -> list[torch.Tensor]:
        assert hidden.shape[1] == token_ids.shape[1]
        found = []
        for step, table in enumerate(self.tables[:steps], start=1):
            tokens = table[token_ids[:, step - 1 : -1], token_ids[:, step:]]
            found.append(torch.nn.functional.one_hot(tokens, len(self.following)).float())
        return found


@pytest.mark.parametrize("num_drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_measured_counts(seed: int, num_drafts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab, prompt_length, num_new = 5, 3, 17
    following = torch.randperm(vocab, generator=generator)
    right = following.expand(vocab, vocab)
    tables = []
    for _ in range(num_drafts):
        wrong = torch.randint(0, vocab, (vocab, vocab), generator=generator)
        is_right = torch.rand(vocab, vocab, generator=generator) < 0.7
        tables.append(torch.where(is_right, right, wrong))
    prompts = torch.randint(0, vocab, (4, prompt_length), generator=generator)

    def head(text: list[int], drafts: list[int]) -> int:
        *_, before, last = [*text, *drafts]
        return int(tables[len(drafts)][before, last])

    counted = [
        decode(prompt, num_new, num_drafts, lambda text: int(following[text[-1]]), head)[1]
        for prompt in prompts.tolist()
    ]
    result = measure_acceptance(ChainModel(following, tables), prompts, num_new, num_drafts)
    assert result.steps == sum(row.steps for row in counted)
    assert result.accepted == tuple(map(sum, zip(*(row.accepted for row in counted), strict=True)))


@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_a_head_that_is_always_right_saves_all_but_one_pass_a_step(num_drafts: int) -> None:
    following = torch.tensor([1, 2, 3, 0])
    model = ChainModel(following, [following.expand(4, 4)] * num_drafts)
    # The prompt's own pass yields a token; 20 more are full steps.
    prompt, steps = torch.zeros(1, 2, dtype=torch.int64), 20 // (num_drafts + 1)
    result = measure_acceptance(model, prompt, 1 + steps * (num_drafts + 1), num_drafts)
    assert result == AcceptanceResult(steps, (steps,) * num_drafts)
    assert result.tokens_per_step == num_drafts + 1
