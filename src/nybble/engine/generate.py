"""Greedy decoding with the embedded runtime. Knows token ids, no text."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from nybble.engine.load import LoadedModel


@torch.no_grad()
def generate_greedy(
    model: LoadedModel, prompts: torch.Tensor, num_new: int, stop_ids: frozenset[int] = frozenset()
) -> torch.Tensor:
    """Continues prompts, int64 [B, T], by ``num_new`` tokens; returns [B, T + new].

    Ends early once every row has produced a stop id; rows that stopped sooner run on.
    """
    cache = DynamicCache(config=model.arch.text_config)
    tokens = prompts
    step_input = prompts
    stopped = torch.zeros(prompts.shape[0], dtype=torch.bool, device=prompts.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=prompts.device)
    for _ in range(num_new):
        hidden = model.hidden(step_input, cache)
        step_input = model.logits(hidden[:, -1:]).argmax(dim=-1)
        tokens = torch.cat([tokens, step_input], dim=1)
        stopped |= torch.isin(step_input[:, 0], stops)
        if bool(stopped.all()):
            break
    return tokens
