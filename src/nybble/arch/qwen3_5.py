"""Qwen3.5 and Qwen3.6, dense: Gated DeltaNet and gated attention 3 : 1, vision tower, MTP head.

Both the vision-language wrapper (``model.language_model.*``, ``model.visual.*``) and the
text-only form (``model.*``) are known.
"""

from __future__ import annotations

from functools import partial

from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextModel,
)

from nybble.arch.dense import known_values
from nybble.arch.gated_delta import VISION_RULE, decoder
from nybble.arch.mtp_head import MtpHead, mtp_spec
from nybble.arch.spec import Architecture, Config, InputGroup

GDN_INPUTS = InputGroup(
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "gdn", "linear_attn.in_proj_qkvz"
)
MTP_KEY = "mtp_num_hidden_layers"


def architecture(config: Config) -> Architecture:
    """Reads config.json of either form; raises whatever a broken value makes of it."""
    values = known_values(config)
    is_wrapper = "text_config" in config
    whole = Qwen3_5Config(**values) if is_wrapper else Qwen3_5TextConfig(**values)
    text_config = whole.text_config if isinstance(whole, Qwen3_5Config) else whole
    assert isinstance(text_config, Qwen3_5TextConfig)
    head = partial(MtpHead, text_config, Qwen3_5DecoderLayer, Qwen3_5RMSNorm)
    return decoder(
        name="qwen3_5",
        text_config=text_config,
        text_prefix="model.language_model." if is_wrapper else "model.",
        tied=bool(config.get("tie_word_embeddings", False)),
        build_text_model=partial(Qwen3_5TextModel, text_config),
        gdn_inputs=GDN_INPUTS,
        mtp=mtp_spec(MTP_KEY, config["text_config"] if is_wrapper else config, head),
        more_rules=(VISION_RULE,),
    )
