"""A checkpoint as large as they come is checked in less than a second."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.sparse_checkpoints import write_index, write_shard

from nybble.doctor.check import check_checkpoint
from nybble.doctor.engines import Family
from nybble.doctor.findings import Harm, Part
from nybble.doctor.layout.registry import layout_of

SHARDS = 18
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "attn_output_gate": True,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "text_config": TEXT,
    "vision_config": {
        "model_type": "qwen3_5_vision",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 5120,
        "num_position_embeddings": 2304,
    },
    "quantization_config": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.language_model.layers",
        "extra_config": {
            pattern: {"bits": 16, "data_type": "fp"}
            for pattern in (".*in_proj_(a|b|ba)$", ".*mtp.*", ".*visual.*")
        },
    },
}


def packed(name: str, outs: int, ins: int) -> dict[str, tuple[str, list[int]]]:
    module = name.removesuffix(".weight")
    return {
        f"{module}.qweight": ("I32", [ins // 8, outs]),
        f"{module}.qzeros": ("I32", [ins // 128, outs // 8]),
        f"{module}.scales": ("F16", [ins // 128, outs]),
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3.6-27B in INT4: its headers, and bodies that take no space."""
    folder = tmp_path_factory.mktemp("large")
    layout = layout_of(CONFIG)
    assert layout is not None
    stored: dict[str, tuple[str, list[int]]] = {}
    for name, shape in layout.tensors.items():
        is_packed = (
            ".language_model.layers." in name
            and name.endswith("_proj.weight" if "linear_attn" not in name else ".weight")
            and name.removesuffix(".weight") in layout.linears
            and not name.endswith(("in_proj_a.weight", "in_proj_b.weight"))
        )
        stored |= packed(name, *shape) if is_packed else {name: ("BF16", list(shape))}
    names = list(stored)
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        own = names[number::SHARDS]
        shapes = {name: stored[name][1] for name in own}
        write_shard(folder / file, shapes, {name: stored[name][0] for name in own})
        weight_map |= dict.fromkeys(own, file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_the_headers_of_27b_take_less_than_a_second(large: Path) -> None:
    check_checkpoint(str(large))  # imports and the disk's cache
    began = time.process_time()
    report = check_checkpoint(str(large))
    assert time.process_time() - began < 1
    # Of the files beside the weights there are none.
    assert {found.code for found in report.findings} == {"D2", "D10", "D18"}
    for verdict in report.verdicts:
        assert verdict.unknown is None
        assert verdict.outcomes[Part.TRUNK].harm is Harm.NONE
        if verdict.engine.family is not Family.TRANSFORMERS:
            assert verdict.outcomes[Part.MTP].harm is Harm.NONE
