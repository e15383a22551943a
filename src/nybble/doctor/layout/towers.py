"""Vision towers: Qwen3.5's own, and the SigLIP of Gemma 3 with its projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.doctor.layout.numbers import Numbers, section
from nybble.doctor.layout.parts import Parts

_QWEN = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}


def add_qwen_tower(parts: Parts, config: Mapping[str, Any]) -> None:
    """``model.visual`` of Qwen3.5's wrapper; raises CheckpointError for unusable numbers.

    Rule: transformers 5.23, modeling_qwen3_5.py, ``Qwen3_5VisionModel``.
    """
    numbers = _vision_numbers(config, _QWEN)
    tower, hidden = "model.visual", numbers.size("hidden_size")
    patch = numbers.size("patch_size")
    kernel = (numbers.size("temporal_patch_size"), patch, patch)
    parts.tensor(f"{tower}.patch_embed.proj.weight", hidden, numbers.size("in_channels"), *kernel)
    parts.tensor(f"{tower}.patch_embed.proj.bias", hidden)
    parts.tensor(f"{tower}.pos_embed.weight", numbers.size("num_position_embeddings"), hidden)
    merged = hidden * numbers.size("spatial_merge_size") ** 2
    parts.norm(f"{tower}.merger.norm", hidden, bias=True)
    parts.linear(f"{tower}.merger.linear_fc1", merged, merged, bias=True)
    parts.linear(f"{tower}.merger.linear_fc2", numbers.size("out_hidden_size"), merged, bias=True)
    inner = numbers.size("intermediate_size")
    for number in range(numbers.blocks("depth")):
        block = f"{tower}.blocks.{number}"
        parts.norm(f"{block}.norm1", hidden, bias=True)
        parts.norm(f"{block}.norm2", hidden, bias=True)
        parts.linear(f"{block}.attn.qkv", 3 * hidden, hidden, bias=True)
        parts.linear(f"{block}.attn.proj", hidden, hidden, bias=True)
        parts.linear(f"{block}.mlp.linear_fc1", inner, hidden, bias=True)
        parts.linear(f"{block}.mlp.linear_fc2", hidden, inner, bias=True)


def add_siglip(parts: Parts, config: Mapping[str, Any], text_hidden: int) -> None:
    """Gemma 3's tower and projector; raises CheckpointError for unusable numbers.

    The pooling head, which no published Gemma has, is listed as tensors alone: no engine
    quantizes it. Rule: transformers 5.23, modeling_siglip.py and modeling_gemma3.py.
    """
    numbers = _vision_numbers(config, _SIGLIP)
    tower, hidden = "model.vision_tower", numbers.size("hidden_size")
    patch, inner = numbers.size("patch_size"), numbers.size("intermediate_size")
    embedding = f"{tower}.embeddings.patch_embedding"
    parts.tensor(f"{embedding}.weight", hidden, numbers.size("num_channels"), patch, patch)
    parts.tensor(f"{embedding}.bias", hidden)
    positions = (numbers.size("image_size") // patch) ** 2
    parts.tensor(f"{tower}.embeddings.position_embedding.weight", positions, hidden)
    for number in range(numbers.blocks()):
        block = f"{tower}.encoder.layers.{number}"
        parts.norm(f"{block}.layer_norm1", hidden, bias=True)
        parts.norm(f"{block}.layer_norm2", hidden, bias=True)
        for member in ("q_proj", "k_proj", "v_proj", "out_proj"):
            parts.linear(f"{block}.self_attn.{member}", hidden, hidden, bias=True)
        parts.linear(f"{block}.mlp.fc1", inner, hidden, bias=True)
        parts.linear(f"{block}.mlp.fc2", hidden, inner, bias=True)
    parts.norm(f"{tower}.post_layernorm", hidden, bias=True)
    if numbers.flag("vision_use_head", default=True):
        _add_pooling_head(parts, f"{tower}.head", hidden, inner)
    projector = "model.multi_modal_projector"
    parts.tensor(f"{projector}.mm_input_projection_weight", hidden, text_hidden)
    parts.norm(f"{projector}.mm_soft_emb_norm", hidden)


def _add_pooling_head(parts: Parts, head: str, hidden: int, inner: int) -> None:
    parts.tensor(f"{head}.probe", 1, 1, hidden)
    parts.tensor(f"{head}.attention.in_proj_weight", 3 * hidden, hidden)
    parts.tensor(f"{head}.attention.in_proj_bias", 3 * hidden)
    parts.norm(f"{head}.layernorm", hidden, bias=True)
    shapes = {
        "attention.out_proj": (hidden, hidden),
        "mlp.fc1": (inner, hidden),
        "mlp.fc2": (hidden, inner),
    }
    for name, (outs, ins) in shapes.items():
        parts.tensor(f"{head}.{name}.weight", outs, ins)
        parts.tensor(f"{head}.{name}.bias", outs)


def _vision_numbers(config: Mapping[str, Any], defaults: Mapping[str, int]) -> Numbers:
    return Numbers(section(config, "vision_config") or {}, defaults, "vision_config.")
