"""A whole checkpoint in memory as dense torch modules, base or quantized.

For models that fit: the bundled tiny one, tests, small models. Quantized weights are de-quantized
to exactly the values the engines compute with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble.arch.spec import Architecture
from nybble.engine.draft import draft_states
from nybble.engine.weights import ModelWeights


@dataclass(frozen=True)
class LoadedModel:
    """Trunk, head and MTP head of one checkpoint, sharing device and dtype."""

    arch: Architecture
    trunk: Any  # transformers' text model: its forward is looked up at run time
    lm_head: torch.Tensor
    """[V, D]"""
    mtp: nn.Module | None

    @torch.no_grad()
    def hidden(self, token_ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Trunk output after the final norm, [B, T, D]; token_ids int64 [B, T]."""
        output = self.trunk(
            input_ids=token_ids, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        assert isinstance(output, torch.Tensor)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [..., V] of hidden states [..., D] (of the trunk or of the MTP head)."""
        return (hidden @ self.lm_head.T).float()

    def drafts(
        self, hidden: torch.Tensor, token_ids: torch.Tensor, steps: int = 1
    ) -> list[torch.Tensor]:
        """What the MTP head makes of hidden [B, T, D] and token_ids, int64 [B, T], teacher-forced.

        Entry j - 1, [B, T - j, D], turns into logits of token t + 1 + j (see ``draft_states``).
        """
        assert self.mtp is not None
        embeds = self.trunk.embed_tokens(token_ids)
        return draft_states(self.mtp, self.trunk.rotary_emb, hidden, embeds, steps)


def load_model(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Loads a checkpoint of any format we write, or a base.

    Raises CheckpointError if it is incomplete, or stored otherwise than it declares.
    """
    with ModelWeights(folder) as weights:
        arch, chosen = weights.arch, torch.device(device)
        text = weights.under(arch.text_prefix, chosen, dtype)
        lm_head = text.get(arch.lm_head.removeprefix(arch.text_prefix))  # a tied one is there
        if lm_head is None:
            lm_head = weights.parameter(arch.lm_head).to(chosen, dtype)
        head = weights.under(arch.mtp.prefix, chosen, dtype) if arch.mtp else {}
    with torch.device("meta"):
        trunk = arch.build_text_model().eval()
        mtp = arch.mtp.build().eval() if arch.mtp else None
    # Buffers (inverse frequencies) are computed, not stored.
    trunk.rotary_emb = type(trunk.rotary_emb)(config=arch.text_config).to(device)
    trunk.load_state_dict(text, assign=True)
    if mtp is not None:
        mtp.load_state_dict(head, assign=True)
    return LoadedModel(arch, trunk.requires_grad_(False), lm_head, mtp)
