"""The multi-token-prediction head of the Qwen3.5 and Qwen3-Next families, as a torch module.

transformers has no module for it (it drops ``mtp.*`` on load and save), so the head is composed
here from transformers' own decoder layer. Parameter names equal the checkpoint's names without
the ``mtp.`` prefix: 15 tensors where the layer's MLP is dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig

from nybble.arch.groups import ATTENTION_GROUPS, MLP_GROUPS
from nybble.arch.spec import Config, MtpSpec
from nybble.core.errors import UnsupportedArchitecture

_PREFIX = "mtp."
_LAYER_PREFIX = f"{_PREFIX}layers.0."


class MtpHead(nn.Module):
    """One MTP step: hidden state of position t and token t+1 in, hidden state for t+2 out.

    ``h' = norm(layer(fc(cat[norm_e(embed(token[t+1])), norm_h(hidden[t])])))``; the shared
    lm_head turns ``h'`` into the logits of token t+2. ``hidden`` is the trunk's output *after*
    its final norm, or this head's own output when drafts are chained (the order and the norms
    are those of vLLM's ``Qwen3_5MultiTokenPredictor`` and ``Qwen3NextMultiTokenPredictor``).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        decoder_layer: type[nn.Module],
        norm: type[nn.Module],
    ) -> None:
        super().__init__()
        layer_config = copy.deepcopy(config)
        layer_config.layer_types = ["full_attention"]
        layer_config.num_hidden_layers = 1
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = norm(hidden, eps)
        self.pre_fc_norm_hidden = norm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        # Number 0 here and in vLLM: whether its MLP is dense is what config.json says of block 0.
        self.layers = nn.ModuleList([decoder_layer(layer_config, 0)])
        self.norm = norm(hidden, eps)

    def fuse(self, hidden: torch.Tensor, next_embeds: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input; all shapes [rows, tokens, hidden_size]."""
        parts = (self.pre_fc_norm_embedding(next_embeds), self.pre_fc_norm_hidden(hidden))
        fused = self.fc(torch.cat(parts, dim=-1))
        assert isinstance(fused, torch.Tensor)
        return fused

    def forward(
        self,
        hidden: torch.Tensor,
        next_embeds: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Shapes: hidden, next_embeds and the result [rows, tokens, hidden_size]."""
        x = self.layers[0](
            self.fuse(hidden, next_embeds),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=cache,
        )
        output = self.norm(x)
        assert isinstance(output, torch.Tensor)
        return output


def mtp_spec(
    key: str, config: Config, build: Callable[[], nn.Module], default: int = 0
) -> MtpSpec | None:
    """The head that ``build`` makes, of as many layers as ``config`` has under ``key``.

    A default of 1 is for families whose config.json is silent. A mixture of experts in its layer
    is kept whole, so then it has no input groups. Raises UnsupportedArchitecture for a head of
    several layers.
    """
    layers = config.get(key, default)
    if not layers:
        return None
    if layers != 1:
        raise UnsupportedArchitecture(
            f"config.json has {key} {layers!r}: heads of one layer are supported"
        )
    with torch.device("meta"):
        head = build()
    shapes = {f"{_PREFIX}{name}": tuple(t.shape) for name, t in head.state_dict().items()}
    is_dense = f"{_LAYER_PREFIX}mlp.down_proj.weight" in shapes
    return MtpSpec(
        declared=key in config,
        prefix=_PREFIX,
        layer_prefix=_LAYER_PREFIX,
        input_groups=ATTENTION_GROUPS + MLP_GROUPS if is_dense else (),
        shapes=shapes,
        build=build,
    )
