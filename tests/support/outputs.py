"""Models' last steps made of plain logits: scored like a model's, without a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nybble.eval import head_pass
from nybble.eval.head_pass import Output
from nybble.eval.kld import Scores, score

CPU = torch.device("cpu")


def output_of(logits: torch.Tensor) -> Output:
    """An output with exactly these logits, [P, V]: its head is the identity."""
    vocab_size = logits.shape[1]
    head = torch.eye(vocab_size, dtype=logits.dtype)
    return Output(logits, lambda start, stop: head[start:stop], vocab_size)


def scored(
    base: torch.Tensor, candidate: torch.Tensor, tokens: list[int] | None = None, windows: int = 1
) -> Scores:
    """Scores of logits [P, V]."""
    following = torch.tensor(tokens if tokens is not None else [0] * len(base))
    return score(output_of(base), output_of(candidate), following, windows, CPU)


@contextmanager
def pieces_of(vocabulary: int, positions: int) -> Iterator[None]:
    """While open, outputs are computed for so many token ids and positions at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_pass, "VOCAB_PIECE", vocabulary)
        patch.setitem(head_pass._LOGITS_PER_PASS, "cpu", vocabulary * positions)
        yield
