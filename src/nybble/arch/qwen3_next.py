"""Qwen3-Next: Gated DeltaNet and gated attention 3 : 1, mixtures of experts, MTP head; text only.

The input projections of a Gated DeltaNet are stored fused. Some blocks may have a dense MLP
(``mlp_only_layers``, ``decoder_sparse_step``).
"""

from __future__ import annotations

from functools import partial

from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextModel,
    Qwen3NextRMSNorm,
)

from nybble.arch.dense import known_values
from nybble.arch.gated_delta import decoder
from nybble.arch.mtp_head import MtpHead, mtp_spec
from nybble.arch.spec import Architecture, Config, InputGroup

_GDN_INPUTS = InputGroup(("linear_attn.in_proj_qkvz",), "gdn", "linear_attn.in_proj_qkvz")

# vLLM's key; the published config.json is silent on its MTP head.
_MTP_KEY = "num_nextn_predict_layers"


def architecture(config: Config) -> Architecture:
    """Reads config.json; raises whatever a broken value makes of it."""
    text_config = Qwen3NextConfig(**known_values(config))
    head = partial(MtpHead, text_config, Qwen3NextDecoderLayer, Qwen3NextRMSNorm)
    return decoder(
        name="qwen3_next",
        text_config=text_config,
        text_prefix="model.",
        tied=bool(text_config.tie_word_embeddings),
        build_text_model=partial(Qwen3NextModel, text_config),
        gdn_inputs=_GDN_INPUTS,
        mtp=mtp_spec(_MTP_KEY, config, head, default=1),
    )
