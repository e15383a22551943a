"""How often the trunk accepts what the MTP head drafts, as a serving engine would count it.

A step drafts n tokens and is worth as many as are right in a row, and one more: the trunk's own.
The text is the same either way under greedy decoding, so it is written once, without drafts, and
the head then drafts at every position of it at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nybble.core.errors import CheckpointError
from nybble.engine.generate import generate_greedy
from nybble.engine.load import LoadedModel


@dataclass(frozen=True)
class AcceptanceResult:
    """Counts as vLLM's spec_decode metrics make them."""

    steps: int
    """Verifications: each had n drafted tokens to check."""
    accepted: tuple[int, ...]
    """Entry j: steps whose first j + 1 drafts were all right."""

    @property
    def rates(self) -> tuple[float, ...]:
        """Of all steps, those whose first j + 1 drafts were right (NaN without steps)."""
        return tuple(count / self.steps if self.steps else math.nan for count in self.accepted)

    @property
    def tokens_per_step(self) -> float:
        """Mean accepted length: the drafts that were right in a row, and the trunk's own token."""
        return 1 + sum(self.rates)


def measure_acceptance(
    model: LoadedModel, prompts: torch.Tensor, num_new: int, num_drafts: int = 1
) -> AcceptanceResult:
    """Continues prompts, int64 [B, T], greedily by ``num_new`` tokens and counts the drafts.

    Raises CheckpointError for a model without an MTP head.
    """
    if model.mtp is None:
        raise CheckpointError("the checkpoint has no MTP head: there is nothing to accept")
    tokens = generate_greedy(model, prompts, num_new)
    drafts = model.drafts(model.hidden(tokens), tokens, num_drafts)
    count = tokens.shape[1] - 1 - num_drafts  # positions with all drafts' tokens behind them
    right = [
        _likeliest(model, draft[:, :count]) == tokens[:, 1 + step : 1 + step + count]
        for step, draft in enumerate(drafts, start=1)
    ]
    return count_steps(torch.stack(right, dim=-1).cpu(), start=prompts.shape[1] - 1)


def _likeliest(model: LoadedModel, states: torch.Tensor) -> torch.Tensor:
    """int64 [B, P] of states [B, P, D]; a row at a time, since logits are large."""
    return torch.stack([model.logits(row).argmax(dim=-1) for row in states])


def count_steps(right: torch.Tensor, start: int) -> AcceptanceResult:
    """Walks every row as an engine does: from ``start``, past what each step was worth.

    ``right``, bool [B, P, n], tells whether the j-th draft made at a position is right.
    """
    in_a_row = right.long().cumprod(dim=-1).sum(dim=-1)
    steps, accepted = 0, [0] * right.shape[-1]
    for row in in_a_row.tolist():
        position = start
        while position < len(row):
            steps += 1
            for draft in range(row[position]):
                accepted[draft] += 1
            position += 1 + row[position]
    return AcceptanceResult(steps, tuple(accepted))
