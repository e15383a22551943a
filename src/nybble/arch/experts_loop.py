"""Routed experts one after the other: how transformers' modules compute them here.

Of transformers' own ways, grouped products, the default, want strides and types that our weights
may lack. Its loop is exact everywhere, but picks each expert out of the stack by its number: the
gradient of that is as large as the stack, once for each expert. Here the stack is taken apart once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "nybble_loop"


def use_loop(config: PreTrainedConfig) -> None:
    """Has modules made of ``config`` from now on compute their experts by ``run_experts``."""
    ALL_EXPERTS_FUNCTIONS.register(_NAME, run_experts)
    config._experts_implementation = _NAME


def run_experts(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Sum over each token's experts of share times ``down(act(gate(x)) * up(x))``, [N, D].

    hidden: [N, D]. chosen: int64 [N, k], numbers of each token's experts. shares: [N, k].
    """
    result = torch.zeros_like(hidden)
    stacks = zip(experts.gate_up_proj.unbind(), experts.down_proj.unbind(), strict=True)
    for number, (gate_up, down) in enumerate(stacks):
        tokens, places = (chosen == number).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = F.linear(hidden[tokens], gate_up).chunk(2, dim=-1)
            outputs = F.linear(experts.act_fn(gate) * up, down) * shares[tokens, places, None]
            result.index_add_(0, tokens, outputs.to(result.dtype))
    return result
