"""What the MTP head drafts after every position of a text, several tokens ahead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

Rotary = Any
"""transformers' rotary embedding: (values, position ids) -> (cosines, sines)."""


@torch.no_grad()
def draft_states(
    head: nn.Module, rotary: Rotary, states: torch.Tensor, embeds: torch.Tensor, steps: int
) -> list[torch.Tensor]:
    """Entry j - 1, [B, T - j, D]: at position t, what predicts token t + 1 + j.

    ``states`` [B, T, D] are the trunk's after its final norm, ``embeds`` the embeddings of the
    text's tokens. Step 1 combines state t with token t + 1; step j its own output of step j - 1
    with token t + j, as an engine does that drafts several tokens with one layer (vLLM's proposer
    for this head). There, what a later step attends to is what was in the cache when it began:
    step 1 at all positions up to t, and the steps since then.
    """
    cache, drafts = DynamicCache(), []
    hidden = states
    for step in range(1, steps + 1):
        count = embeds.shape[1] - step
        positions = torch.arange(step - 1, step - 1 + count, device=embeds.device)[None]
        mask = _visible(embeds.shape[1], step, embeds.device) if step > 1 else None
        hidden = head(hidden[:, :count], embeds[:, step:], rotary(embeds, positions), mask, cache)
        drafts.append(hidden)
    return drafts


def _visible(length: int, step: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, queries, keys] of a step after the first; keys stand in the order of steps."""
    queries = torch.arange(length - step, device=device)[:, None]
    first = torch.arange(length - 1, device=device)[None] <= queries
    since = [
        torch.arange(length - earlier, device=device)[None] == queries
        for earlier in range(2, step + 1)
    ]
    return torch.cat([first, *since], dim=1)[None, None]
