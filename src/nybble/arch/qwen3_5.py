"""Qwen3.5 and Qwen3.6, dense: Gated DeltaNet and gated attention 3 : 1, vision tower, MTP head.

Both the vision-language wrapper (``model.language_model.*``, ``model.visual.*``) and the
text-only form (``model.*``) are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextModel

from nybble.arch.qwen3_5_mtp import Qwen3_5MtpHead
from nybble.arch.spec import Architecture, Config, InputGroup, KeepRule, MtpSpec
from nybble.core.errors import UnsupportedArchitecture

MTP_PREFIX = "mtp."

_INPUT_GROUPS = (
    InputGroup(("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), "gdn"),
    InputGroup(("linear_attn.out_proj",), "gdn"),
    InputGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention"),
    InputGroup(("self_attn.o_proj",), "attention"),
    InputGroup(("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    InputGroup(("mlp.down_proj",), "mlp"),
)


def architecture(config: Config) -> Architecture:
    """Reads config.json of either form; raises whatever a broken value makes of it."""
    text_config = _text_config(config)
    prefix = "model.language_model." if "text_config" in config else "model."
    tied = bool(config.get("tie_word_embeddings", False))
    return Architecture(
        name="qwen3_5",
        text_config=text_config,
        text_prefix=prefix,
        num_blocks=text_config.num_hidden_layers,
        lm_head=f"{prefix}embed_tokens.weight" if tied else "lm_head.weight",
        input_groups=_INPUT_GROUPS,
        keep_rules=_keep_rules(prefix),
        mtp=_mtp(text_config, config),
        build_text_model=partial(Qwen3_5TextModel, text_config),
    )


def _text_config(config: Config) -> Qwen3_5TextConfig:
    known = {key: value for key, value in config.items() if key != "quantization_config"}
    if "text_config" in config:
        text_config = Qwen3_5Config(**known).text_config
    else:
        text_config = Qwen3_5TextConfig(**known)
    assert isinstance(text_config, Qwen3_5TextConfig)
    text_config._attn_implementation = "sdpa"
    return text_config


def _keep_rules(prefix: str) -> tuple[KeepRule, ...]:
    text, block = prefix.replace(".", r"\."), prefix.replace(".", r"\.") + r"layers\.\d+\."
    small = "small, drives the recurrence, fits no kernel"
    return (
        KeepRule(text + r"embed_tokens\.weight", "embeddings", "a lookup table"),
        KeepRule(r"lm_head\.weight", "lm_head", "sensitive"),
        KeepRule(text + r"norm\.weight", "norms", "a vector"),
        KeepRule(block + r"(input|post_attention)_layernorm\.weight", "norms", "a vector"),
        KeepRule(block + r"self_attn\.[qk]_norm\.weight", "norms", "a vector"),
        KeepRule(block + r"linear_attn\.norm\.weight", "norms", "a vector"),
        KeepRule(block + r"linear_attn\.(A_log|dt_bias)", "gdn", "constants"),
        KeepRule(block + r"linear_attn\.conv1d\.weight", "gdn", "4 taps a channel"),
        KeepRule(block + r"linear_attn\.in_proj_[ab]\.weight", "gdn", small),
        KeepRule(r"model\.visual\..+", "vision", "vision tower"),
        KeepRule(r"mtp\..+", "mtp", "drafts must match"),
    )


def _mtp(text: Qwen3_5TextConfig, config: Config) -> MtpSpec | None:
    values: Mapping[str, Any] = config.get("text_config", config)
    layers = values.get("mtp_num_hidden_layers", 0)
    if not layers:
        return None
    if layers != 1:
        raise UnsupportedArchitecture(
            f"config.json has mtp_num_hidden_layers {layers!r}: heads of one layer are supported"
        )
    shapes = {f"{MTP_PREFIX}{name}": shape for name, shape in _mtp_shapes(text).items()}
    return MtpSpec(prefix=MTP_PREFIX, shapes=shapes, build=partial(Qwen3_5MtpHead, text))


def _mtp_shapes(text: Qwen3_5TextConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (2 * queries, hidden),  # queries and their output gate
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    return {
        "fc.weight": (hidden, 2 * hidden),
        "norm.weight": (hidden,),
        "pre_fc_norm_embedding.weight": (hidden,),
        "pre_fc_norm_hidden.weight": (hidden,),
        **{f"layers.0.{name}": shape for name, shape in layer.items()},
    }
