"""MTP drafts on given text, teacher-forced and streamed: no text is generated.

Every position of the text is a place where an engine could draft. Two ways of accepting: greedy,
where a draft must be the trunk's most likely token; and by sampling at temperature 1, where the
exact rule of speculative sampling accepts with probability sum_v min(p_v, q_v), p the trunk's and
q the head's distribution (Leviathan et al. 2023, arXiv 2211.17192, section 3.2). Later drafts are
made as if the earlier ones had been right, that is, of the text's own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from nybble.core.errors import CheckpointError
from nybble.engine.draft import draft_states
from nybble.engine.stream import Arithmetic, OnBlock, final_states, silent
from nybble.engine.weights import ModelWeights
from nybble.eval.head_pass import Output, RunningSoftmax, pieces


@dataclass(frozen=True)
class DraftScores:
    """For every position with room for all drafts behind it, [R, P, n] each."""

    greedy: torch.Tensor
    """bool: the draft is the trunk's most likely token."""
    sampled: torch.Tensor
    """float64: the probability that sampling accepts the draft."""


@dataclass(frozen=True)
class Acceptance:
    """Of one way of accepting: figures per draft, first to last."""

    rates: tuple[float, ...]
    """Share of steps whose drafts up to this one are all accepted."""
    standard_errors: tuple[float, ...]
    """Of the rates, from the windows' means; NaN with one window."""

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted length, the trunk's own token included."""
        return 1 + sum(self.rates)


def score_drafts(
    weights: ModelWeights,
    windows: torch.Tensor,
    how: Arithmetic,
    num_drafts: int,
    on_block: OnBlock = silent,
) -> DraftScores:
    """Drafts at every position of windows, int64 [R, T].

    Raises CheckpointError for a checkpoint without an MTP head, and for windows too short.
    """
    if weights.arch.mtp is None:
        raise CheckpointError(
            f"{weights.reader.index.folder} has no MTP head: there is nothing to accept"
        )
    if windows.shape[1] < num_drafts + 2:
        raise CheckpointError(
            f"windows of {windows.shape[1]} tokens leave no room for {num_drafts} drafts"
        )
    states = final_states(weights, windows, how, on_block)
    drafts = _drafted(weights, windows, states, how, num_drafts)
    count = windows.shape[1] - num_drafts
    greedy, sampled = [], []
    for step, draft in enumerate(drafts, start=1):
        pair = (
            _output(weights, states[:, step : step + count]),
            _output(weights, draft[:, :count]),
        )
        match, overlap = _compare(pair, how.device)
        greedy.append(match.view(len(windows), count))
        sampled.append(overlap.view(len(windows), count))
    return DraftScores(torch.stack(greedy, dim=-1), torch.stack(sampled, dim=-1))


def acceptance(accepted: torch.Tensor) -> Acceptance:
    """Figures from [R, P, n]: what ``DraftScores`` holds, of either way."""
    in_a_row = accepted.double().cumprod(dim=-1)
    windows = in_a_row.mean(dim=1)
    errors = torch.full_like(windows[0], math.nan)
    if len(windows) > 1:
        errors = windows.std(dim=0) / len(windows) ** 0.5
    return Acceptance(tuple(windows.mean(dim=0).tolist()), tuple(errors.tolist()))


@torch.no_grad()
def _drafted(
    weights: ModelWeights,
    windows: torch.Tensor,
    states: torch.Tensor,
    how: Arithmetic,
    num_drafts: int,
) -> list[torch.Tensor]:
    mtp = weights.arch.mtp
    assert mtp is not None
    with torch.device("meta"):
        head = mtp.build().eval()
        trunk: Any = weights.arch.build_text_model()
    head.load_state_dict(weights.under(mtp.prefix, how.device, how.dtype), assign=True)
    rotary = type(trunk.rotary_emb)(config=weights.arch.text_config).to(how.device)
    made: list[list[torch.Tensor]] = []
    for first in range(0, len(windows), how.rows_per_pass):
        rows = slice(first, first + how.rows_per_pass)
        embeds = weights.embedded(windows[rows], how.dtype).to(how.device)
        found = draft_states(head, rotary, states[rows].to(how.device), embeds, num_drafts)
        made.append([draft.cpu() for draft in found])
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def _output(weights: ModelWeights, states: torch.Tensor) -> Output:
    return Output(states.flatten(0, 1), weights.head_rows, weights.vocab_size)


def _compare(
    pair: tuple[Output, Output], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same most likely token, bool [P]; sum of min(p, q), float64 [P]. Two passes."""
    count = len(pair[0].states)
    softmaxes = [RunningSoftmax(torch.zeros(count, dtype=torch.int64), device) for _ in pair]
    for piece in pieces(pair, device):
        for softmax, logits in zip(softmaxes, piece.logits, strict=True):
            softmax.add(piece.positions, piece.start, logits)
    normalizers = [softmax.log_normalizer.to(device) for softmax in softmaxes]
    overlap = torch.zeros(count, dtype=torch.float64, device=device)
    for piece in pieces(pair, device):
        at = piece.positions
        probabilities = [
            (logits - normalizer[at, None].to(logits.dtype)).exp_()
            for logits, normalizer in zip(piece.logits, normalizers, strict=True)
        ]
        overlap[at] += torch.minimum(*probabilities).sum(dim=-1, dtype=torch.float64)
    return softmaxes[0].top == softmaxes[1].top, overlap.cpu()
