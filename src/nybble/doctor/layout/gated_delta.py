"""Qwen3.5, Qwen3.6 and Qwen3-Next: Gated DeltaNet and gated attention, and the MTP head.

Rules: transformers 5.23, modeling_{qwen3_5,qwen3_5_moe,qwen3_next}.py, and for the head, which
transformers lacks, vLLM 0.32, qwen3_5_mtp.py and qwen3_next_mtp.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import CheckpointError
from nybble.doctor.layout.numbers import Numbers, section
from nybble.doctor.layout.parts import Parts
from nybble.doctor.layout.spec import Layout
from nybble.doctor.layout.towers import add_qwen_tower

_SHARED = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


@dataclass(frozen=True)
class GatedDelta:
    """What sets one of these families apart."""

    defaults: Mapping[str, int]
    """What transformers' config class fills in where config.json is silent."""
    mtp_key: str
    is_mixture: bool
    is_next: bool = False
    """Qwen3-Next: a DeltaNet's input projections are stored fused, and config.json can name
    blocks of a mixture whose MLP is dense."""


QWEN3_5 = GatedDelta(
    {
        **_SHARED,
        "num_key_value_heads": 4,
        "vocab_size": 248320,
        "intermediate_size": 12288,
        "mtp_num_hidden_layers": 0,
    },
    mtp_key="mtp_num_hidden_layers",
    is_mixture=False,
)
QWEN3_5_MOE = GatedDelta(
    {**_SHARED, "vocab_size": 248320, "num_experts": 256, "mtp_num_hidden_layers": 0},
    mtp_key="mtp_num_hidden_layers",
    is_mixture=True,
)
# The published config.json is silent on its MTP head; vLLM takes it that there is one.
QWEN3_NEXT = GatedDelta(
    {
        **_SHARED,
        "vocab_size": 151936,
        "intermediate_size": 5632,
        "num_experts": 512,
        "num_nextn_predict_layers": 1,
    },
    mtp_key="num_nextn_predict_layers",
    is_mixture=True,
    is_next=True,
)


def gated_delta_layout(family: GatedDelta, architecture: str, config: Mapping[str, Any]) -> Layout:
    """The layout of either form; raises CheckpointError for unusable numbers.

    A text-only architecture may come with the wrapper's config.json, and then with its names.
    """
    text = section(config, "text_config")
    has_tower = architecture.endswith("ForConditionalGeneration")
    if has_tower and text is None:
        raise CheckpointError(f"config.json of a {architecture} has no text_config")
    numbers = Numbers(config if text is None else text, family.defaults)
    if text is not None:
        numbers = Numbers(text, family.defaults, "text_config.")
    model = "model" if text is None else "model.language_model"
    tied_inside = numbers.flag("tie_word_embeddings")
    tied = Numbers(config, {}).flag("tie_word_embeddings") if has_tower else tied_inside
    parts = Parts()
    if has_tower:
        add_qwen_tower(parts, config)
    hidden, vocabulary = numbers.size("hidden_size"), numbers.size("vocab_size")
    parts.tensor(f"{model}.embed_tokens.weight", vocabulary, hidden)
    is_mixture = _mixtures(family, numbers)
    for number, is_linear in enumerate(numbers.attends_linearly()):
        _add_mixer(parts, f"{model}.layers.{number}", is_linear, family, numbers)
        _add_mlp(parts, f"{model}.layers.{number}.mlp", is_mixture(number), numbers)
    parts.norm(f"{model}.norm", hidden)
    parts.head(vocabulary, hidden, stored=not tied, built=not (tied and tied_inside))
    mtp_blocks = numbers.blocks_or_none(family.mtp_key)
    if mtp_blocks:
        _add_mtp(parts, hidden)
    for number in range(mtp_blocks):
        _add_mixer(parts, f"mtp.layers.{number}", False, family, numbers)
        _add_mlp(parts, f"mtp.layers.{number}.mlp", is_mixture(number), numbers)
    return Layout(
        architecture=architecture,
        tensors=parts.tensors,
        linears=parts.linears,
        stacks=parts.stacks,
        blocks=f"{model}.layers",
        has_mtp=mtp_blocks > 0,
        is_wrapper=text is not None,
        tied=tied,
        ties_disagree=tied != tied_inside,
    )


def _mixtures(family: GatedDelta, numbers: Numbers) -> Callable[[int], bool]:
    """Whether the MLP of a block, of the decoder or the MTP head, is a mixture of experts."""
    if not family.is_next:
        return lambda _number: family.is_mixture
    has_experts = numbers.size("num_experts", least=0) > 0
    dense = numbers.whole_numbers("mlp_only_layers")
    step = numbers.size("decoder_sparse_step")
    return lambda number: has_experts and number not in dense and (number + 1) % step == 0


def _add_mtp(parts: Parts, hidden: int) -> None:
    """All of the head but its blocks."""
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        parts.norm(f"mtp.{name}", hidden)
    parts.linear("mtp.fc", hidden, 2 * hidden)


def _add_mixer(
    parts: Parts, block: str, is_linear: bool, family: GatedDelta, numbers: Numbers
) -> None:
    """All of a block but its MLP."""
    hidden = numbers.size("hidden_size")
    parts.norm(f"{block}.input_layernorm", hidden)
    parts.norm(f"{block}.post_attention_layernorm", hidden)
    if is_linear:
        _add_delta_net(parts, f"{block}.linear_attn", family, numbers)
    else:
        _add_attention(parts, f"{block}.self_attn", numbers)


def _add_mlp(parts: Parts, name: str, is_mixture: bool, numbers: Numbers) -> None:
    hidden = numbers.size("hidden_size")
    if not is_mixture:
        parts.gated_mlp(name, hidden, numbers.size("intermediate_size"))
        return
    experts = numbers.size("num_experts")
    parts.linear(f"{name}.gate", experts, hidden)
    parts.linear(f"{name}.shared_expert_gate", 1, hidden)
    shared = numbers.size("shared_expert_intermediate_size")
    parts.gated_mlp(f"{name}.shared_expert", hidden, shared)
    parts.experts(f"{name}.experts", experts, numbers.size("moe_intermediate_size"), hidden)


def _add_attention(parts: Parts, name: str, numbers: Numbers) -> None:
    """Queries come with a gate of the same size."""
    hidden, head = numbers.size("hidden_size"), numbers.size("head_dim")
    queries = numbers.size("num_attention_heads") * head
    keys = numbers.size("num_key_value_heads") * head
    bias = numbers.flag("attention_bias")
    parts.linear(f"{name}.q_proj", 2 * queries, hidden, bias)
    parts.linear(f"{name}.k_proj", keys, hidden, bias)
    parts.linear(f"{name}.v_proj", keys, hidden, bias)
    parts.linear(f"{name}.o_proj", hidden, queries, bias)
    parts.norm(f"{name}.q_norm", head)
    parts.norm(f"{name}.k_norm", head)


def _add_delta_net(parts: Parts, name: str, family: GatedDelta, numbers: Numbers) -> None:
    hidden, heads = numbers.size("hidden_size"), numbers.size("linear_num_value_heads")
    head = numbers.size("linear_value_head_dim")
    keys = numbers.size("linear_num_key_heads") * numbers.size("linear_key_head_dim")
    values = heads * head
    convolved = 2 * keys + values
    parts.tensor(f"{name}.dt_bias", heads)
    parts.tensor(f"{name}.A_log", heads)
    parts.tensor(f"{name}.conv1d.weight", convolved, 1, numbers.size("linear_conv_kernel_dim"))
    parts.norm(f"{name}.norm", head)
    if family.is_next:
        parts.linear(f"{name}.in_proj_qkvz", convolved + values, hidden)
        parts.linear(f"{name}.in_proj_ba", 2 * heads, hidden)
    else:
        parts.linear(f"{name}.in_proj_qkv", convolved, hidden)
        parts.linear(f"{name}.in_proj_z", values, hidden)
        parts.linear(f"{name}.in_proj_b", heads, hidden)
        parts.linear(f"{name}.in_proj_a", heads, hidden)
    parts.linear(f"{name}.out_proj", hidden, values)
