"""Declarations of compressed-tensors of every kind, sound, odd and hostile, by name."""

from __future__ import annotations

from .ct_blocks import (
    FLOAT8,
    FLOAT_TOKENS,
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    PORTABLE,
    TOKENS,
    WITHOUT_MTP,
    Block,
    block,
    group,
)

TRUNK = "model.language_model.layers.3"
TENSOR8 = TOKENS | {"strategy": "tensor", "dynamic": False}
BLOCK8 = FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}
MXFP8 = MXFP4 | {"num_bits": 8, "scale_dtype": "torch.uint8"}
EXACT = tuple(
    f"mtp.{name}"
    for name in (
        "fc",
        *(f"layers.0.self_attn.{one}_proj" for one in "qkvo"),
        *(f"layers.0.mlp.{one}_proj" for one in ("gate", "up", "down")),
    )
)

RULES: dict[str, Block] = {
    "portable": block(),
    "without mtp": block(ignore=WITHOUT_MTP),
    "nothing ignored": block(ignore=()),
    "mtp by exact names": block(ignore=(*WITHOUT_MTP, *EXACT)),
    "mtp by all but one": block(ignore=(*WITHOUT_MTP, *EXACT[:-2])),
    "bare prefixes": block(ignore=("mtp", "model.visual", "lm_head")),
    "some parts": block(ignore=(*PORTABLE, f"{TRUNK}.self_attn.q_proj")),
    "escaped prefix": block(ignore=(r"re:^model\.language_model\.",)),
    "fused name": block(ignore=("re:.*qkv_proj", f"{TRUNK}.mlp.gate_up_proj")),
    "targets by pattern": block(group(None, r"re:.*layers\.\d+\.(self_attn|mlp)\.")),
    "targets of the trunk": block(group(None, "re:.*language_model.*"), ignore=()),
    "targets by name": block(group(None, f"{TRUNK}.self_attn.o_proj"), ignore=()),
    "targets by parts": block(group(None, *(f"{TRUNK}.self_attn.{x}_proj" for x in "qkv"))),
    "targets by some parts": block(group(None, f"{TRUNK}.self_attn.q_proj"), group(INT8)),
    "targets by class": block(group(None, "RowParallel"), group(INT8, "Merged")),
    "targets of the head": block(group(None, "re:.*lm_head"), ignore=()),
    "first target": block(group(INT4, "re:.*self_attn.*"), group(INT8, "Linear"), ignore=()),
    "attention group": block(group(None, "Qwen3_5Attention"), group()),
    "experts alone": block(group(None, r"re:.*experts\.\d+\..*"), ignore=()),
    "experts by parts": block(group(None, r"re:.*gate_proj"), group(INT8, "re:.*up_proj")),
    "bad pattern": block(ignore=("re:(",)),
    "no groups": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "underscore": block() | {"quant_method": "compressed-tensors", "unknown": 1},
}
SCHEMES: dict[str, Block] = {
    "channel": block(group(INT4 | {"strategy": "channel", "group_size": None})),
    "8 bits": block(group(INT4 | {"num_bits": 8})),
    "3 bits": block(group(INT4 | {"num_bits": 3})),
    "1 bit": block(group(INT4 | {"num_bits": 1}), ignore=()),
    "asymmetric": block(group(INT4 | {"symmetric": False})),
    "format of the group": block(group(format="pack-quantized"), name="mixed-precision"),
    "no format": block(name=None),
    "W8A16 as integers": block(group(INT8), name="int-quantized"),
    "W8A8": block(group(INT8, input_activations=TOKENS), name="int-quantized"),
    "W8A8 by tensor": block(group(INT8, input_activations=TENSOR8), name="int-quantized"),
    "W8A8 packed": block(group(INT8, input_activations=TOKENS)),
    "W8A8 in and out": block(
        group(INT8, input_activations=TENSOR8, output_activations=TENSOR8), name="int-quantized"
    ),
    "W4A8": block(group(INT4, input_activations=TOKENS), name="int-quantized"),
    "FP8": block(group(FLOAT8, input_activations=FLOAT_TOKENS), name="float-quantized"),
    "FP8 weights": block(group(FLOAT8), name="float-quantized"),
    "FP8 by groups": block(group(FLOAT8 | {"strategy": None}), name="naive-quantized"),
    "FP8 by blocks": block(
        group(BLOCK8, input_activations=FLOAT_TOKENS), name="float-quantized", ignore=()
    ),
    "FP8 packed": block(group(FLOAT8 | {"strategy": "group", "group_size": 64})),
    "FP8 as dense": block(group(FLOAT8), name="dense"),
    "NVFP4": block(group(NVFP4), name="nvfp4-pack-quantized"),
    "NVFP4 and INT8": block(
        group(NVFP4, input_activations=TOKENS), name="nvfp4-pack-quantized", ignore=()
    ),
    "MXFP4": block(group(MXFP4), name="mxfp4-pack-quantized"),
    "MXFP8": block(group(MXFP8), name="mxfp8-quantized"),
    "head in 1 bit": block(group(INT4 | {"num_bits": 1}, "re:.*lm_head"), ignore=()),
    "head in dynamic bits": block(group(INT8, "re:.*lm_head"), name="dense", ignore=()),
}
ARGUMENTS: dict[str, Block] = {
    str(change): block(group(INT4 | change))
    for change in (
        {"actorder": "group"},
        {"actorder": "Dynamic"},
        {"actorder": True},
        {"actorder": "weight"},
        {"actorder": "static"},
        {"actorder": False},
        {"actorder": "sorted"},
        {"actorder": "weight", "strategy": "channel", "group_size": None},
        {"num_bits": None},
        {"num_bits": 4.0},
        {"num_bits": 4.5},
        {"num_bits": [4]},
        {"type": "INT"},
        {"type": "integer"},
        {"type": None},
        {"type": 3},
        {"symmetric": 1},
        {"symmetric": 2},
        {"symmetric": None},
        {"group_size": "128"},
        {"group_size": [128]},
        {"group_size": -2},
        {"group_size": 0},
        {"group_size": 0, "strategy": None},
        {"group_size": -1, "strategy": None},
        {"group_size": 128, "strategy": None},
        {"group_size": None},
        {"group_size": 1.5},
        {"strategy": "channel"},
        {"strategy": "Group"},
        {"strategy": "rows"},
        {"strategy": 4},
        {"strategy": "block"},
        {"strategy": "token"},
        {"strategy": "attn_head", "group_size": None},
        {"block_structure": [1, 2, 3]},
        {"block_structure": [16, 16]},
        {"dynamic": True},
        {"dynamic": "local"},
        {"dynamic": "global"},
        {"dynamic": None},
        {"observer": 3},
        {"observer_kwargs": None},
        {"scale_dtype": "torch.nothing"},
        {"scale_dtype": "bfloat16"},
        {"zp_dtype": 4},
        {"type": "float", "num_bits": 6},
        {"unknown": None},
    )
}
HOSTILE: dict[str, Block] = {
    "groups are a list": block() | {"config_groups": []},
    "groups are null": block() | {"config_groups": None},
    "group is null": block() | {"config_groups": {"a": None}},
    "group is a list": block() | {"config_groups": {"a": ["Linear"]}},
    "no targets": block() | {"config_groups": {"a": {"weights": INT4}}},
    "targets are null": block(group() | {"targets": None}),
    "targets are numbers": block(group() | {"targets": [1, 2]}),
    "no target": block(group() | {"targets": []}),
    "no weights": block(group() | {"weights": None}),
    "weights are a list": block(group() | {"weights": []}),
    "ignore is null": block(ignore=None),
    "ignore is a number": block(ignore=4),
    "ignore holds numbers": block(ignore=[4]),
    "sparsity": block()
    | {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}},
    "sparsity without format": block() | {"sparsity_config": {"targets": []}},
    "empty sparsity": block() | {"sparsity_config": {}},
}

OTHERS: dict[str, Block] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "fp8 of blocks": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [
            "lm_head",
            "mtp.fc",
            "model.visual.blocks.0.attn.qkv",
            *(f"{TRUNK}.self_attn.{one}_proj" for one in "qkv"),
            f"{TRUNK}.mlp.experts.0.gate_proj",
        ],
    },
    "fp8 of some parts": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": [f"{TRUNK}.self_attn.q_proj", "mtp"],
    },
    "fp8, nothing said": {"quant_method": "fp8"},
    "fp8, unknown scheme": {"quant_method": "fp8", "activation_scheme": "none"},
    "fp8, odd blocks": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128],
    },
    "fp8, blocks of no list": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": 128,
    },
    "modelopt FP8": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head", "model.visual*", "mtp*", "*linear_attn.in_proj_ba"],
    },
    "modelopt NVFP4": {"quant_method": "modelopt", "quant_algo": "nvfp4", "ignore": ["visual"]},
    "modelopt, parts": {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PB_WO",
        "ignore": [f"{TRUNK}.self_attn.q_proj", "model.language_model.layers.0.*"],
    },
    "modelopt, nested": {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}},
    "modelopt, unknown": {"quant_method": "modelopt", "quant_algo": "FP2"},
    "modelopt, nothing said": {"quant_method": "modelopt"},
    "modelopt, no list": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": "mtp"},
}
