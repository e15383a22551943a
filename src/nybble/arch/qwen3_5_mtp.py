"""The multi-token-prediction head of Qwen3.5, as a torch module.

transformers has no module for it (it drops ``mtp.*`` on load and save), so the head is composed
here from transformers' own decoder layer. Parameter names equal the checkpoint's names without
the ``mtp.`` prefix: 15 tensors.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm


class Qwen3_5MtpHead(nn.Module):
    """One MTP step: hidden state of position t and token t+1 in, hidden state for t+2 out.

    ``h' = norm(layer(fc(cat[norm_e(embed(token[t+1])), norm_h(hidden[t])])))``; the shared
    lm_head turns ``h'`` into the logits of token t+2. ``hidden`` is the trunk's output *after*
    its final norm, or this head's own output when drafts are chained (the order and the norms
    are those of vLLM's ``Qwen3_5MultiTokenPredictor``).
    """

    def __init__(self, config: Qwen3_5TextConfig) -> None:
        super().__init__()
        layer_config = copy.deepcopy(config)
        layer_config.layer_types = ["full_attention"]
        layer_config.num_hidden_layers = 1
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(hidden, eps=eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(layer_config, layer_idx=0)])
        self.norm = Qwen3_5RMSNorm(hidden, eps=eps)

    def forward(
        self,
        hidden: torch.Tensor,
        next_embeds: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shapes: hidden, next_embeds and the result [rows, tokens, hidden_size]."""
        parts = (self.pre_fc_norm_embedding(next_embeds), self.pre_fc_norm_hidden(hidden))
        x = self.fc(torch.cat(parts, dim=-1))
        x = self.layers[0](
            x, position_embeddings=position_embeddings, attention_mask=attention_mask
        )
        output = self.norm(x)
        assert isinstance(output, torch.Tensor)
        return output
