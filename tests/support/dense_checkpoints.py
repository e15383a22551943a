"""Tiny dense checkpoints with random weights, written without the code under test.

config.json is what the hub's checkpoints of each family look like; names and shapes of the tensors
are those of transformers' own model. Windows are shorter than the rows that tests use.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import VOCAB, tiny_tokenizer, write_json, write_weights
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 16

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
_GEMMA3_TEXT: dict[str, Any] = {
    **_SHARED,
    "model_type": "gemma3_text",
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}
_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", **_SHARED, "rope_theta": 500000.0}
    | {"rope_scaling": _LLAMA3_ROPE, "attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {"model_type": "mistral", **_SHARED, "rope_theta": 10000.0}
    | {"sliding_window": WINDOW, "head_dim": 64},
    "Qwen2ForCausalLM": {"model_type": "qwen2", **_SHARED, "rope_theta": 1000000.0}
    | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 3},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **_SHARED, "rope_theta": 1000000.0}
    | {"head_dim": 64, "use_sliding_window": True, "sliding_window": WINDOW}
    | {"max_window_layers": 1, "attention_bias": False},
    "Gemma3ForCausalLM": _GEMMA3_TEXT,
    "Gemma3ForConditionalGeneration": {
        "model_type": "gemma3",
        "text_config": _GEMMA3_TEXT,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 4,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "image_token_index": 3,
        "torch_dtype": "bfloat16",
    },
}
"""config.json by architecture; Gemma 3 is tied where nothing is said, the others are not."""


@dataclass(frozen=True)
class Dense:
    """What a tiny dense checkpoint is made of."""

    name: str
    """The architecture in config.json."""
    values: tuple[tuple[str, Any], ...] = ()
    """Values of config.json to change; of its text_config, where it has one."""
    stores_tied_head: bool = False
    """Whether a tied lm_head.weight is stored as well."""
    seed: int = 0


def dense_config(dense: Dense) -> dict[str, Any]:
    """config.json of a checkpoint."""
    config, changes = CONFIGS[dense.name], dict(dense.values)
    if "text_config" in config:
        changes = {"text_config": {**config["text_config"], **changes}}
        if "tie_word_embeddings" in changes["text_config"]:
            changes["tie_word_embeddings"] = changes["text_config"]["tie_word_embeddings"]
    return {"architectures": [dense.name], **copy.deepcopy(config), **changes}


def dense_tensors(dense: Dense) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, BF16, of plausible sizes, under transformers 5's names."""
    values = {k: v for k, v in dense_config(dense).items() if k != "architectures"}
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    generator = torch.Generator().manual_seed(dense.seed)
    is_offset = dense.name.startswith("Gemma3")
    tensors = {
        name: _values(name, tuple(tensor.shape), is_offset, generator)
        for name, tensor in sorted(shapes.items())
    }
    if dense.stores_tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def _values(
    name: str, shape: tuple[int, ...], is_offset: bool, generator: torch.Generator
) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        values = 0.1 * values
        if "norm" in name and name.endswith(".weight") and not is_offset:
            values = 1 + values
    elif "embed" in name:
        values = (0.05 if is_offset else 0.5) * values  # offsets and scaled embeddings go together
    else:
        values = values / shape[-1] ** 0.5
    return values.bfloat16()


def stored_by_transformers_4(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a vision-language Gemma 3 under the hub's names."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("model.language_model.", "language_model.model.")
        renamed[name.removeprefix("model.")] = tensor
    return renamed


def write_dense(folder: Path, dense: Dense) -> Path:
    """A whole checkpoint folder; returns it."""
    folder.mkdir(parents=True)
    write_weights(folder, dense_tensors(dense))
    write_json(folder / "config.json", dense_config(dense))
    tiny_tokenizer().save_pretrained(folder)
    return folder
