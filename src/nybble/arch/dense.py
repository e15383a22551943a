"""Dense decoders of attention and a gated MLP: Llama, Mistral, Qwen2 and Qwen3.

What sets them apart (biases, norms of queries and keys, sliding windows) is read off
transformers' own modules, so a family is one line of ``FAMILIES``. Gemma 3, which also scales its
embeddings and comes with a vision tower, has a file of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from nybble.arch.groups import ATTENTION_GROUPS, MLP_GROUPS
from nybble.arch.spec import Architecture, Config, KeepRule
from nybble.core.errors import UnsupportedArchitecture

FAMILIES: dict[str, tuple[str, type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "LlamaForCausalLM": ("llama", LlamaConfig, LlamaModel),
    "MistralForCausalLM": ("mistral", MistralConfig, MistralModel),
    "Qwen2ForCausalLM": ("qwen2", Qwen2Config, Qwen2Model),
    "Qwen3ForCausalLM": ("qwen3", Qwen3Config, Qwen3Model),
}
"""By the name in config.json: our name, transformers' config and its model without a head."""


def architecture(config: Config) -> Architecture:
    """Reads config.json; raises whatever a broken value makes of it."""
    name, config_class, model_class = FAMILIES[config["architectures"][0]]
    if config.get("layer_types") is not None and not hasattr(config_class, "layer_types"):
        raise UnsupportedArchitecture(
            f"config.json has layer_types, which transformers' {name} ignores and engines do not: "
            "a model whose attention alternates needs an architecture that says so"
        )
    text_config = config_class(**known_values(config))
    tied = bool(text_config.tie_word_embeddings)
    return decoder(name, text_config, "model.", tied, partial(model_class, text_config))


def decoder(
    name: str,
    text_config: PreTrainedConfig,
    text_prefix: str,
    tied: bool,
    build_text_model: Callable[[], PreTrainedModel],
    more_rules: tuple[KeepRule, ...] = (),
    embedding_scale: float = 1.0,
) -> Architecture:
    """A dense decoder whose blocks hold ``self_attn``, ``mlp`` and vectors, and nothing else."""
    text_config._attn_implementation = "sdpa"
    return Architecture(
        name=name,
        text_config=text_config,
        text_prefix=text_prefix,
        num_blocks=text_config.num_hidden_layers,
        layer_kinds=_layer_kinds(text_config),
        lm_head=f"{text_prefix}embed_tokens.weight" if tied else "lm_head.weight",
        input_groups=ATTENTION_GROUPS + MLP_GROUPS,
        keep_rules=_keep_rules(text_prefix, build_text_model) + more_rules,
        mtp=None,
        build_text_model=build_text_model,
        embedding_scale=embedding_scale,
    )


def known_values(config: Config) -> dict[str, Any]:
    """What transformers' config class is made of; a copy, because it changes nested values."""
    return copy.deepcopy({k: v for k, v in config.items() if k != "quantization_config"})


def _layer_kinds(text_config: PreTrainedConfig) -> tuple[str, ...]:
    kinds = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return tuple(kind.removesuffix("_attention") for kind in kinds)
    # Mistral has one window for all blocks. Llama has none, whatever its config.json says.
    windowed = hasattr(type(text_config), "sliding_window") and text_config.sliding_window
    kind = "sliding" if windowed else "full"
    return tuple(kind for _ in range(text_config.num_hidden_layers))


def _keep_rules(prefix: str, build: Callable[[], PreTrainedModel]) -> tuple[KeepRule, ...]:
    text = re.escape(prefix)
    return (
        KeepRule(text + r"embed_tokens\.weight", "embeddings", "a lookup table"),
        KeepRule(r"lm_head\.weight", "lm_head", "sensitive"),
        KeepRule(text + r"norm\.weight", "norms", "a vector"),
        *(
            KeepRule(text + r"layers\.\d+\." + re.escape(name), part, "a vector")
            for name, part in _vectors_of_a_block(build).items()
        ),
    )


def _vectors_of_a_block(build: Callable[[], PreTrainedModel]) -> dict[str, str]:
    """Name within the block, and part, of every vector; all blocks of these families have them."""
    with torch.device("meta"):
        blocks = build().layers
    assert isinstance(blocks, nn.ModuleList)
    return {
        name: "biases" if name.endswith(".bias") else "norms"
        for name, tensor in blocks[0].state_dict().items()
        if tensor.dim() == 1
    }
