"""One pass over the vocabulary: output heads applied piece by piece, nothing of size [P, V] held.

The head of a large model is gigabytes, its logits on a test set terabytes. Each piece of the
head is read once and met by all positions; what a metric needs of a softmax is accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

VOCAB_PIECE = 8192
"""Rows of the head in memory at a time; a multiple of 32."""
_LOGITS_PER_PASS = {"cpu": 2**19, "cuda": 2**25}
"""On a CPU what is done to them one after the other then stays in the cache: 3 times faster."""


@dataclass(frozen=True)
class Output:
    """A model's last step: states, and the head that turns them into logits."""

    states: torch.Tensor
    """[P, D], after the final norm, on the CPU; their type is that of the product."""
    head_rows: Callable[[int, int], torch.Tensor]
    """(start, stop) -> rows of the head, [stop - start, D]."""
    vocab_size: int


@dataclass(frozen=True)
class Piece:
    """Logits of some positions for some of the vocabulary."""

    positions: slice
    start: int
    """The first token id."""
    logits: tuple[torch.Tensor, ...]
    """One [p, v] per model, float32 or float64."""


@torch.no_grad()
def pieces(outputs: Sequence[Output], device: torch.device) -> Iterator[Piece]:
    """Every position and token id once; all of a vocabulary piece before the next one."""
    vocab_size, count = outputs[0].vocab_size, len(outputs[0].states)
    step = _LOGITS_PER_PASS[device.type] // VOCAB_PIECE
    for start in range(0, vocab_size, VOCAB_PIECE):
        stop = min(start + VOCAB_PIECE, vocab_size)
        heads = [
            output.head_rows(start, stop).to(device, output.states.dtype) for output in outputs
        ]
        for first in range(0, count, step):
            positions = slice(first, min(first + step, count))
            logits = tuple(
                _wide(output.states[positions].to(device) @ head.T)
                for output, head in zip(outputs, heads, strict=True)
            )
            yield Piece(positions, start, logits)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class RunningSoftmax:
    """Per position: normaliser, most likely token, and the logit of a token of interest.

    ``add`` takes a model's pieces, in any order. Sums are float64, relative to the largest logit
    so far.
    """

    def __init__(self, tokens: torch.Tensor, device: torch.device) -> None:
        """``tokens``: int64 [P], the token of interest at each position."""
        self._tokens = tokens.to(device)
        self._peak = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._peak)
        self._top = torch.zeros_like(self._tokens)
        self._token_logit = self._peak.clone()

    def add(
        self, positions: slice, start: int, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a piece [p, v].

        Returns exp(logits - peak), [p, v], and what sums of earlier ones are to be multiplied
        with, [p], since the peak has moved.
        """
        tops, ids = logits.max(dim=-1)
        old = self._peak[positions]
        new = torch.maximum(old, tops.double())
        shrink = (old - new).exp()
        weights = (logits - new.to(logits.dtype)[:, None]).exp_()
        self._top[positions] = torch.where(tops > old, ids + start, self._top[positions])
        sums = weights.sum(dim=-1, dtype=torch.float64)
        self._total[positions] = self._total[positions] * shrink + sums
        self._peak[positions] = new
        self._note_tokens(positions, start, logits)
        return weights, shrink

    def weighted_mean(self, sums: torch.Tensor) -> torch.Tensor:
        """float64 [P]: expectations, from sums of values weighted with what ``add`` returned."""
        return (sums / self._total).cpu()

    @property
    def log_normalizer(self) -> torch.Tensor:
        """float64 [P]: log of the sum of exponentials, once all pieces are in."""
        return (self._peak + self._total.log()).cpu()

    @property
    def token_log_probs(self) -> torch.Tensor:
        """float64 [P]: of the tokens of interest."""
        return self._token_logit.cpu() - self.log_normalizer

    @property
    def top(self) -> torch.Tensor:
        """int64 [P]: the most likely token."""
        return self._top.cpu()

    @property
    def confidence(self) -> torch.Tensor:
        """float64 [P]: the probability of the most likely token."""
        return (1 / self._total).cpu()

    def _note_tokens(self, positions: slice, start: int, logits: torch.Tensor) -> None:
        column = self._tokens[positions] - start
        here = (column >= 0) & (column < logits.shape[1])
        found = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        noted = self._token_logit[positions]
        self._token_logit[positions] = torch.where(here, found.double(), noted)
