"""How often the trunk accepts the MTP head's draft, as a serving engine would count it.

On-policy: the trunk continues each prompt greedily, then the head drafts along that text. With
one draft token per step, an engine at position t drafts token t+2 while it emits token t+1; the
draft is accepted if the trunk's own token t+2 is the same, and the next step then starts two
tokens on, otherwise one. The text is the same either way, so the count needs no second decoding.
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
    """Counts as vLLM's spec_decode metrics make them, for one draft token per step."""

    drafts: int
    accepted: int

    @property
    def rate(self) -> float:
        """Accepted drafts / drafts (NaN without drafts); bounds the speed-up at 1 + rate."""
        return self.accepted / self.drafts if self.drafts else math.nan


def measure_acceptance(model: LoadedModel, prompts: torch.Tensor, num_new: int) -> AcceptanceResult:
    """Continues prompts, int64 [B, T], by ``num_new`` tokens and counts the drafts accepted."""
    if model.mtp is None:
        raise CheckpointError("the checkpoint has no MTP head: there is nothing to accept")
    tokens = generate_greedy(model, prompts, num_new)
    drafted = model.logits(model.drafted(model.hidden(tokens), tokens)).argmax(dim=-1)
    matches = drafted[:, :-1] == tokens[:, 2:]  # column t: the draft of token t+2
    counts = [count_drafts(row, prompts.shape[1] - 1) for row in matches.tolist()]
    return AcceptanceResult(
        drafts=sum(drafts for drafts, _ in counts), accepted=sum(hits for _, hits in counts)
    )


def count_drafts(matches: list[bool], start: int) -> tuple[int, int]:
    """(drafts, accepted) of one row; ``matches[t]`` tells whether position t's draft is right."""
    drafts = accepted = 0
    position = start
    while position < len(matches):
        drafts += 1
        accepted += matches[position]
        position += 2 if matches[position] else 1
    return drafts, accepted
