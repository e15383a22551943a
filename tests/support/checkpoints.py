"""Tiny Qwen3.5 checkpoints with random weights, written without the code under test.

Three Gated DeltaNet blocks and one gated attention block of hidden size 128, a vision tower, an
MTP head of 15 tensors and a byte-level BPE tokenizer. The trunk's names and shapes come from
transformers, the MTP head's are spelled out here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

WRAPPER_PREFIX = "model.language_model."
TEXT_ONLY_PREFIX = "model."
VOCAB = 320
HIDDEN = 128
INNER = 256
HEAD_DIM = 64
HEADS = 2
KEY_HEADS = 1

TEXT_VALUES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attn_output_gate": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
VISION_VALUES: dict[str, Any] = {
    "model_type": "qwen3_5_vision",
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
MTP_SHAPES: dict[str, tuple[int, ...]] = {
    "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
    "mtp.norm.weight": (HIDDEN,),
    "mtp.pre_fc_norm_embedding.weight": (HIDDEN,),
    "mtp.pre_fc_norm_hidden.weight": (HIDDEN,),
    "mtp.layers.0.input_layernorm.weight": (HIDDEN,),
    "mtp.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "mtp.layers.0.self_attn.q_proj.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
    "mtp.layers.0.self_attn.k_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "mtp.layers.0.self_attn.v_proj.weight": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "mtp.layers.0.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "mtp.layers.0.self_attn.q_norm.weight": (HEAD_DIM,),
    "mtp.layers.0.self_attn.k_norm.weight": (HEAD_DIM,),
    "mtp.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "mtp.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "mtp.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
}
LINEAR_BLOCK_QUANTIZED = (
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.out_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FULL_BLOCK_QUANTIZED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SIDECARS: dict[str, str] = {
    "generation_config.json": '{"do_sample": false, "eos_token_id": [2], "pad_token_id": 0}\n',
    "preprocessor_config.json": '{"patch_size": 16, "image_mean": [0.5, 0.5, 0.5]}\n',
    "chat_template.jinja": (
        "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor -%}\n"
    ),
    "LICENSE": "Apache-2.0, as an example\n",
}
_WORD_LINE = (
    "block weight scale round draft token head state gate value query key norm layer hidden "
    "while return yield import class print range self none true false index shape group error"
)
WORDS = _WORD_LINE.split()


@dataclass(frozen=True)
class Tiny:
    """What a tiny checkpoint is made of."""

    wrapper: bool = True
    """The vision-language form; else the text-only one."""
    seed: int = 0
    shards: int = 1
    tied: bool = False
    mtp: bool = True
    float32_a_log: bool = False
    text: tuple[tuple[str, Any], ...] = ()
    """Values of the text config to change."""

    @property
    def prefix(self) -> str:
        """Of the text model's tensor names."""
        return WRAPPER_PREFIX if self.wrapper else TEXT_ONLY_PREFIX


def quantized_modules(prefix: str) -> set[str]:
    """The Linears that a recipe quantizes, as this project promises them."""
    blocks = [LINEAR_BLOCK_QUANTIZED] * 3 + [FULL_BLOCK_QUANTIZED]
    return {
        f"{prefix}layers.{index}.{module}"
        for index, modules in enumerate(blocks)
        for module in modules
    }


def tiny_config(tiny: Tiny) -> dict[str, Any]:
    """config.json, as the exporter of the real checkpoints writes it."""
    text = {**TEXT_VALUES, "tie_word_embeddings": tiny.tied, **dict(tiny.text)}
    if not tiny.mtp:
        del text["mtp_num_hidden_layers"]
    if not tiny.wrapper:
        name = "Qwen3_5ForCausalLM"
        return {"architectures": [name], "model_type": "qwen3_5_text", **text}
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": "bfloat16",
        "tie_word_embeddings": tiny.tied,
        "text_config": {"model_type": "qwen3_5_text", **text},
        "vision_config": dict(VISION_VALUES),
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    }


def trunk_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that transformers knows of a checkpoint: no MTP head."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    with torch.device("meta"):
        model: torch.nn.Module
        if "text_config" in config:
            model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**values))
        else:
            model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**values))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def tiny_tensors(tiny: Tiny) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, BF16, of plausible sizes."""
    shapes = trunk_shapes(tiny_config(tiny))
    if tiny.tied:
        del shapes["lm_head.weight"]
    if tiny.mtp:
        shapes |= MTP_SHAPES
    generator = torch.Generator().manual_seed(tiny.seed)
    tensors = {
        name: plausible_values(name, shape, generator) for name, shape in sorted(shapes.items())
    }
    if tiny.float32_a_log:
        for name in tensors:
            if name.endswith("A_log"):
                tensors[name] = tensors[name].float() + 1e-3
    return tensors


def plausible_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random BF16 weights of the sizes that tensors of this name have."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        values = values.abs() + 0.1
    elif name.endswith("linear_attn.norm.weight"):
        values = 1 + 0.1 * values  # the one norm whose weight is not an offset from 1
    elif len(shape) == 1:
        values = 0.1 * values
    elif name.endswith("conv1d.weight") or "embed" in name:
        values = 0.5 * values
    else:
        values = values / shape[-1] ** 0.5
    return values.bfloat16()


def write_tiny(folder: Path, tiny: Tiny = Tiny()) -> Path:
    """A whole checkpoint folder; returns it."""
    folder.mkdir(parents=True)
    write_weights(folder, tiny_tensors(tiny), tiny.shards)
    write_json(folder / "config.json", tiny_config(tiny))
    tiny_tokenizer().save_pretrained(folder)
    for name, text in SIDECARS.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("# The base's own card\n", encoding="utf-8")
    return folder


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Writes the weights anew, as one file or as so many with an index; old ones are removed."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file({name: tensors[name] for name in names}, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        chosen = names[number::shards]
        save_file({name: tensors[name] for name in chosen}, folder / file_name)
        weight_map |= dict.fromkeys(chosen, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 310 entries, the special tokens first."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"]
    specials += ["<|vision_start|>", "<|vision_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([random_text(400, seed=7)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )


def random_text(words: int, seed: int) -> str:
    """Words in random order, ten a line."""
    draw = random.Random(seed)
    picked = [draw.choice(WORDS) for _ in range(words)]
    return "\n".join(" ".join(picked[i : i + 10]) for i in range(0, words, 10)) + "\n"
