"""Tiny checkpoints of mixtures of experts with random weights, written without the code under test.

Three Gated DeltaNet blocks and one of gated attention, hidden size 128, four experts of 64 of which
each token takes two, a shared expert of 128. Of Qwen3-Next, block 1 has a dense MLP. The trunk's
names and shapes are those of transformers' own model, the MTP head's are spelled out here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from support.checkpoints import (
    VISION_VALUES,
    VOCAB,
    plausible_values,
    tiny_tokenizer,
    write_json,
    write_weights,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

HIDDEN, EXPERTS, PER_TOKEN, INNER, SHARED = 128, 4, 2, 64, 128
HEAD_DIM, HEADS, KEY_HEADS = 64, 2, 1
BLOCKS, DENSE_BLOCK = 4, 1

Form = Literal["stacks", "one by one"]
"""How experts are stored."""

_SHARED_VALUES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "moe_intermediate_size": INNER,
    "shared_expert_intermediate_size": SHARED,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_QWEN3_5_TEXT: dict[str, Any] = {
    **_SHARED_VALUES,
    "model_type": "qwen3_5_moe_text",
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3_5MoeForConditionalGeneration": {
        "model_type": "qwen3_5_moe",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": _QWEN3_5_TEXT,
        "vision_config": {**VISION_VALUES, "model_type": "qwen3_5_moe_vision"},
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    },
    "Qwen3_5MoeForCausalLM": _QWEN3_5_TEXT,
    "Qwen3NextForCausalLM": {
        **_SHARED_VALUES,
        "model_type": "qwen3_next",
        "intermediate_size": 256,
        "full_attention_interval": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [DENSE_BLOCK],
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "rope_scaling": None,
        "use_sliding_window": False,
    },
}
"""config.json by architecture, as published: Qwen3-Next's says nothing of an MTP head."""

_ATTENTION_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.q_norm.weight": (HEAD_DIM,),
    "self_attn.k_norm.weight": (HEAD_DIM,),
}
_MOE_SHAPES: dict[str, tuple[int, ...]] = {
    "mlp.gate.weight": (EXPERTS, HIDDEN),
    "mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
    "mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
    "mlp.shared_expert.gate_proj.weight": (SHARED, HIDDEN),
    "mlp.shared_expert.up_proj.weight": (SHARED, HIDDEN),
    "mlp.shared_expert.down_proj.weight": (HIDDEN, SHARED),
    "mlp.shared_expert_gate.weight": (1, HIDDEN),
}
MTP_SHAPES: dict[str, tuple[int, ...]] = {
    "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
    "mtp.norm.weight": (HIDDEN,),
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    **{f"mtp.layers.0.{n}": shape for n, shape in {**_ATTENTION_SHAPES, **_MOE_SHAPES}.items()},
}
"""In the model; a checkpoint may hold the experts one by one."""


@dataclass(frozen=True)
class Moe:
    """What a tiny checkpoint is made of."""

    name: str = "Qwen3_5MoeForConditionalGeneration"
    """The architecture in config.json."""
    form: Form = "stacks"
    mtp: Form | None = "one by one"
    """How the experts of its MTP layer are stored; None: it has no MTP head."""
    seed: int = 0
    values: tuple[tuple[str, Any], ...] = ()
    """Values of the text config to change."""

    @property
    def prefix(self) -> str:
        """Of the text model's tensor names."""
        is_wrapper = self.name.endswith("ForConditionalGeneration")
        return "model.language_model." if is_wrapper else "model."

    @property
    def moe_blocks(self) -> list[int]:
        """The blocks that have experts."""
        skipped = (DENSE_BLOCK,) if self.name.startswith("Qwen3Next") else ()
        return [block for block in range(BLOCKS) if block not in skipped]


def moe_config(moe: Moe) -> dict[str, Any]:
    """config.json of a checkpoint."""
    config = copy.deepcopy(CONFIGS[moe.name])
    text = config.get("text_config", config)
    text |= dict(moe.values)
    if moe.mtp is None:
        text.pop("mtp_num_hidden_layers", None)
    return {"architectures": [moe.name], **config}


def model_tensors(moe: Moe) -> dict[str, torch.Tensor]:
    """All tensors as the model has them, experts in stacks; BF16, of plausible sizes."""
    values = {k: v for k, v in moe_config(moe).items() if k != "architectures"}
    is_wrapper = "text_config" in values
    loader = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(AutoConfig.for_model(**values))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if moe.mtp:
        shapes |= MTP_SHAPES
    generator = torch.Generator().manual_seed(moe.seed)
    return {
        name: plausible_values(name, shape, generator) for name, shape in sorted(shapes.items())
    }


def moe_tensors(moe: Moe) -> dict[str, torch.Tensor]:
    """All tensors as they are stored."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model_tensors(moe).items():
        form = moe.mtp if name.startswith("mtp.") else moe.form
        if form == "one by one" and ".experts." in name:
            tensors |= split_experts(name, tensor)
        else:
            tensors[name] = tensor
    return tensors


def split_experts(name: str, stack: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Linears of a stack, by tensor name."""
    owner, _, kind = name.rpartition(".")
    parts = {}
    for expert, matrix in enumerate(stack):
        if kind == "gate_up_proj":
            half = len(matrix) // 2
            parts[f"{owner}.{expert}.gate_proj.weight"] = matrix[:half].clone()
            parts[f"{owner}.{expert}.up_proj.weight"] = matrix[half:].clone()
        else:
            parts[f"{owner}.{expert}.down_proj.weight"] = matrix.clone()
    return parts


def write_moe(folder: Path, moe: Moe, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A whole checkpoint folder, of other tensors if these are given; returns it."""
    folder.mkdir(parents=True)
    write_weights(folder, moe_tensors(moe) if tensors is None else tensors)
    write_json(folder / "config.json", moe_config(moe))
    tiny_tokenizer().save_pretrained(folder)
    return folder
