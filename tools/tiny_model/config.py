"""Shape of the tiny model: Qwen3.6-27B's architecture, scaled down.

Kept from the real one: three linear-attention blocks to one full-attention block; three value
heads to one key head in GDN; six query heads to one key/value head, with output gate and a
quarter of each head rotated; untied embeddings; one MTP layer. ``in_proj_a``/``in_proj_b`` have
6 outputs (48 in the real one): no multiple of 32, which packing kernels want. Every quantized
layer's in_features is a multiple of 128.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5 import Qwen3_5Config

HIDDEN = 256
MAX_POSITIONS = 2048

TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "attn_output_gate": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    """The checkpoint's config.json, token ids taken from ``tokenizer``."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config=VISION,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.dtype = "bfloat16"
    return config
