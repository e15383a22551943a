"""What the families of Gated DeltaNet and gated attention share: Qwen3.5 and Qwen3-Next.

Their MLPs are dense, or mixtures of routed experts with one shared expert that all tokens pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from transformers import PreTrainedConfig, PreTrainedModel

from nybble.arch.experts_loop import use_loop
from nybble.arch.groups import ATTENTION_GROUPS, MLP_GROUPS
from nybble.arch.spec import Architecture, Experts, InputGroup, KeepRule, MtpSpec
from nybble.core.errors import CheckpointError

GDN_OUTPUT_GROUP = InputGroup(("linear_attn.out_proj",), "gdn", "linear_attn.out_proj")
VISION_RULE = KeepRule(r"model\.visual\..+", "vision", "vision tower")

_SHARED_EXPERT_GROUPS = (
    InputGroup(
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "shared expert",
        "mlp.shared_expert.gate_up_proj",
    ),
    InputGroup(("mlp.shared_expert.down_proj",), "shared expert", "mlp.shared_expert.down_proj"),
)


def decoder(
    name: str,
    text_config: PreTrainedConfig,
    text_prefix: str,
    tied: bool,
    build_text_model: Callable[[], PreTrainedModel],
    gdn_inputs: InputGroup,
    mtp: MtpSpec | None,
    more_rules: tuple[KeepRule, ...] = (),
) -> Architecture:
    """An architecture of these families; ``gdn_inputs`` are a DeltaNet's large input projections.

    In a block, groups stand in the order in which they are executed, the routed experts last.
    Raises CheckpointError for a model without blocks.
    """
    if text_config.num_hidden_layers < 1:
        raise CheckpointError(
            f"config.json has num_hidden_layers {text_config.num_hidden_layers}: there is no block"
        )
    text_config._attn_implementation = "sdpa"
    use_loop(text_config)
    count = getattr(text_config, "num_experts", 0)
    mlp_groups = MLP_GROUPS + _SHARED_EXPERT_GROUPS if count else MLP_GROUPS
    return Architecture(
        name=name,
        text_config=text_config,
        text_prefix=text_prefix,
        num_blocks=text_config.num_hidden_layers,
        layer_kinds=tuple(k.removesuffix("_attention") for k in text_config.layer_types or ()),
        lm_head=f"{text_prefix}embed_tokens.weight" if tied else "lm_head.weight",
        input_groups=(gdn_inputs, GDN_OUTPUT_GROUP, *ATTENTION_GROUPS, *mlp_groups),
        keep_rules=_keep_rules(text_prefix) + more_rules,
        mtp=mtp,
        build_text_model=build_text_model,
        experts=Experts("mlp.experts", count) if count else None,
    )


def _keep_rules(prefix: str) -> tuple[KeepRule, ...]:
    text, block = re.escape(prefix), re.escape(prefix) + r"layers\.\d+\."
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
        KeepRule(block + r"linear_attn\.in_proj_(a|b|ba)\.weight", "gdn", small),
        KeepRule(block + r"mlp\.gate\.weight", "router", "small, chooses the experts"),
        KeepRule(block + r"mlp\.shared_expert_gate\.weight", "shared expert", "a vector"),
        KeepRule(r"mtp\..+", "mtp", "drafts must match"),
    )
