"""Qwen3.5 and Qwen3.6: Gated DeltaNet and gated attention 3 : 1, vision tower, MTP head.

Both the vision-language wrapper (``model.language_model.*``, ``model.visual.*``) and the text-only
form (``model.*``) are known, with dense MLPs and with mixtures of experts in all blocks. The
published checkpoints hold the experts of a block as two stacks, those of the MTP layer as stacks
or one by one; both are read wherever they occur.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextModel,
)
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
from nybble.arch.spec import Architecture, Config, InputGroup

_GDN_INPUTS = InputGroup(
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "gdn", "linear_attn.in_proj_qkvz"
)


@dataclass(frozen=True)
class _Family:
    """transformers' classes for one of the two."""

    name: str
    wrapper_config: type[PreTrainedConfig]
    text_config: type[PreTrainedConfig]
    text_model: type[PreTrainedModel]
    decoder_layer: type[nn.Module]
    norm: type[nn.Module]


_DENSE = _Family(
    "qwen3_5",
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
)
_MOE = _Family(
    "qwen3_5_moe",
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5MoeTextModel,
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
)
FAMILIES = {
    "Qwen3_5ForConditionalGeneration": _DENSE,
    "Qwen3_5ForCausalLM": _DENSE,
    "Qwen3_5MoeForConditionalGeneration": _MOE,
    "Qwen3_5MoeForCausalLM": _MOE,
}
"""By the name in config.json."""


def architecture(config: Config) -> Architecture:
    """Reads config.json of either form; raises whatever a broken value makes of it."""
    family = FAMILIES[config["architectures"][0]]
    values = known_values(config)
    is_wrapper = "text_config" in config
    if is_wrapper:
        text_config = family.wrapper_config(**values).text_config
    else:
        text_config = family.text_config(**values)
    assert isinstance(text_config, family.text_config)
    head = partial(MtpHead, text_config, family.decoder_layer, family.norm)
    own = config["text_config"] if is_wrapper else config
    return decoder(
        name=family.name,
        text_config=text_config,
        text_prefix="model.language_model." if is_wrapper else "model.",
        tied=bool(config.get("tie_word_embeddings", False)),
        build_text_model=partial(family.text_model, text_config),
        gdn_inputs=_GDN_INPUTS,
        mtp=mtp_spec("mtp_num_hidden_layers", own, head),
        more_rules=(VISION_RULE,),
    )
