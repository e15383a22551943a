"""Qwen3.5 and Qwen3.6 with mixtures of experts: as the dense ones, but for the MLPs of all blocks.

The published checkpoints hold the experts of a block as two stacks, those of the MTP layer as
stacks or one by one. Both are read wherever they occur.
"""

from __future__ import annotations

from functools import partial

from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeTextModel,
)

from nybble.arch.dense import known_values
from nybble.arch.gated_delta import VISION_RULE, decoder
from nybble.arch.mtp_head import MtpHead, mtp_spec
from nybble.arch.qwen3_5 import GDN_INPUTS, MTP_KEY
from nybble.arch.spec import Architecture, Config


def architecture(config: Config) -> Architecture:
    """Reads config.json of either form; raises whatever a broken value makes of it."""
    values = known_values(config)
    is_wrapper = "text_config" in config
    whole = Qwen3_5MoeConfig(**values) if is_wrapper else Qwen3_5MoeTextConfig(**values)
    text_config = whole.text_config if isinstance(whole, Qwen3_5MoeConfig) else whole
    assert isinstance(text_config, Qwen3_5MoeTextConfig)
    head = partial(MtpHead, text_config, Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm)
    return decoder(
        name="qwen3_5_moe",
        text_config=text_config,
        text_prefix="model.language_model." if is_wrapper else "model.",
        tied=bool(config.get("tie_word_embeddings", False)),
        build_text_model=partial(Qwen3_5MoeTextModel, text_config),
        gdn_inputs=GDN_INPUTS,
        mtp=mtp_spec(MTP_KEY, config["text_config"] if is_wrapper else config, head),
        more_rules=(VISION_RULE,),
    )
