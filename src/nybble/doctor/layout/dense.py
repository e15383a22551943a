"""Dense decoders of attention and a gated MLP: Llama, Mistral, Qwen2, Qwen3 and Gemma 3.

Rules: transformers 5.23, modeling_*.py and configuration_*.py of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.doctor.layout.numbers import Numbers, section
from nybble.doctor.layout.parts import Parts
from nybble.doctor.layout.spec import Layout
from nybble.doctor.layout.towers import add_siglip


@dataclass(frozen=True)
class Dense:
    """What sets one of these families apart."""

    defaults: Mapping[str, int | None]
    """What transformers' config class fills in where config.json is silent."""
    attention_bias: bool | None = None
    """Whether queries, keys and values have a bias; None: all of attention, as config.json says."""
    mlp_bias: bool = False
    """Whether config.json can ask for one."""
    head_norms: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False
    """Where config.json is silent."""


LLAMA = Dense(
    {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    mlp_bias=True,
)
MISTRAL = Dense(
    {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
    },
    attention_bias=False,
)
QWEN2 = Dense(
    {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": None,
    },
    attention_bias=True,
)
QWEN3 = Dense({**QWEN2.defaults, "head_dim": 128}, head_norms=True)
GEMMA3 = Dense(
    {
        "vocab_size": 262208,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
    head_norms=True,
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    tied=True,
)


def dense_layout(family: Dense, architecture: str, config: Mapping[str, Any]) -> Layout:
    """The layout of a model without a vision tower; raises CheckpointError for unusable numbers."""
    tied = Numbers(config, {}).flag("tie_word_embeddings", family.tied)
    parts = Parts()
    _add_decoder(parts, "model", family, Numbers(config, family.defaults), not tied, not tied)
    return _layout(parts, architecture, "model", tied, ties_disagree=False)


def gemma3_wrapper_layout(architecture: str, config: Mapping[str, Any]) -> Layout:
    """The layout of Gemma 3 with its vision tower; raises CheckpointError for unusable numbers.

    Names are those of transformers 5. What transformers 4 stored has others (``vision_tower.*``,
    ``language_model.model.*``).
    """
    text = section(config, "text_config")
    if text is None:
        raise CheckpointError(f"config.json of a {architecture} has no text_config")
    numbers = Numbers(text, GEMMA3.defaults, "text_config.")
    tied = Numbers(config, {}).flag("tie_word_embeddings", GEMMA3.tied)
    tied_inside = numbers.flag("tie_word_embeddings", GEMMA3.tied)
    parts = Parts()
    add_siglip(parts, config, numbers.size("hidden_size"))
    built = not (tied and tied_inside)
    _add_decoder(parts, "model.language_model", GEMMA3, numbers, not tied, built)
    return _layout(parts, architecture, "model.language_model", tied, tied != tied_inside)


def _layout(parts: Parts, architecture: str, model: str, tied: bool, ties_disagree: bool) -> Layout:
    return Layout(
        architecture=architecture,
        tensors=parts.tensors,
        linears=parts.linears,
        stacks=parts.stacks,
        blocks=f"{model}.layers",
        has_mtp=False,
        is_wrapper=model != "model",
        tied=tied,
        ties_disagree=ties_disagree,
    )


def _add_decoder(
    parts: Parts, model: str, family: Dense, numbers: Numbers, head_stored: bool, head_built: bool
) -> None:
    hidden, vocabulary = numbers.size("hidden_size"), numbers.size("vocab_size")
    inner = numbers.size("intermediate_size")
    parts.tensor(f"{model}.embed_tokens.weight", vocabulary, hidden)
    for number in range(numbers.blocks()):
        block = f"{model}.layers.{number}"
        for norm in family.norms:
            parts.norm(f"{block}.{norm}", hidden)
        _add_attention(parts, f"{block}.self_attn", family, numbers)
        bias = family.mlp_bias and numbers.flag("mlp_bias")
        parts.gated_mlp(f"{block}.mlp", hidden, inner, bias)
    parts.norm(f"{model}.norm", hidden)
    parts.head(vocabulary, hidden, head_stored, head_built)


def _add_attention(parts: Parts, name: str, family: Dense, numbers: Numbers) -> None:
    hidden, heads = numbers.size("hidden_size"), numbers.size("num_attention_heads")
    head = numbers.size_or("head_dim", hidden // heads)
    queries = heads * head
    keys = numbers.size_or("num_key_value_heads", heads) * head
    asked = family.attention_bias is None and numbers.flag("attention_bias")
    bias = asked or family.attention_bias is True
    parts.linear(f"{name}.q_proj", queries, hidden, bias)
    parts.linear(f"{name}.k_proj", keys, hidden, bias)
    parts.linear(f"{name}.v_proj", keys, hidden, bias)
    parts.linear(f"{name}.o_proj", hidden, queries, asked)
    if family.head_norms:
        parts.norm(f"{name}.q_norm", head)
        parts.norm(f"{name}.k_norm", head)
