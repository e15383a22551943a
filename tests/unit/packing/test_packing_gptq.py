from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nybble.core.errors import CheckpointError
from nybble.packing.format import Declaration
from nybble.packing.gptq import (
    declared_grid,
    pack,
    packed_specs,
    quantization_config,
    refusals,
    sidecars,
)
from nybble.quant.grid import IntGrid, QuantizedWeight, minmax_scale

Declare = Callable[..., Declaration]

TRUNK = "model.language_model.layers"
GRID, EIGHT = IntGrid(4, 128, True), IntGrid(8, 64, True)


@pytest.mark.parametrize(("group_size", "expected"), [(64, [0] * 64 + [1] * 64), (-1, [0] * 128)])
def test_the_group_of_every_input_is_stored(group_size: int, expected: list[int]) -> None:
    grid = IntGrid(4, group_size, True)
    weight = minmax_scale(torch.randn(32, 128), grid)
    stored = pack("m", QuantizedWeight(torch.zeros(32, 128, dtype=torch.int8), weight, grid))
    assert stored["m.g_idx"].tolist() == expected
    specs = {spec.name: spec for spec in packed_specs("m", (32, 128), grid)}
    assert set(specs) == set(stored)
    assert specs["m.g_idx"].shape == (128,)
    assert specs["m.g_idx"].dtype == stored["m.g_idx"].dtype == torch.int32


def test_our_configuration_block(declare: Declare) -> None:
    block = quantization_config(declare())
    assert json.loads(json.dumps(block)) == block
    modules = block.pop("modules_in_block_to_quantize")
    assert sorted(map(tuple, modules)) == [
        ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        ("linear_attn.out_proj",),
        ("mlp.down_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.o_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ]
    assert block == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": {
            r"-:.*linear_attn\.in_proj_(a|b|ba)$": {},
            "-:.*mtp.*": {},
            "-:.*visual.*": {},
            "-:.*lm_head.*": {},
        },
    }


def test_the_block_is_a_file_of_its_own_as_well(declare: Declare) -> None:
    block = quantization_config(declare())
    [(name, content)] = sidecars(block).items()
    assert name == "quantize_config.json"
    assert json.loads(content) == block


def test_linears_dense_in_all_blocks_are_not_listed(declare: Declare) -> None:
    block = quantization_config(declare(lambda _, m: None if "self_attn" in m else GRID))
    assert not any(
        "self_attn" in name for names in block["modules_in_block_to_quantize"] for name in names
    )
    assert declared_grid(block, f"{TRUNK}.3.self_attn.q_proj") is None


def test_linears_dense_in_some_blocks_are_listed_by_number(declare: Declare) -> None:
    block = quantization_config(
        declare(lambda block, m: None if block in (1, 10) and m == "mlp.down_proj" else GRID)
    )
    listed = [name for names in block["modules_in_block_to_quantize"] for name in names]
    downs = [name for name in listed if "down" in name]
    assert downs == [f"layers.{n}.mlp.down_proj" for n in (0, 2, 3, 4, 5, 6, 7, 8, 9, 11)]
    # Transformers looks at the end of a name, in either of its forms.
    for prefix in (TRUNK, "model.layers"):
        found = [
            n for n in range(12) if any(f"{prefix}.{n}.mlp.down_proj".endswith(d) for d in downs)
        ]
        assert found == [0, 2, 3, 4, 5, 6, 7, 8, 9, 11]
    assert r"-:.*model\.layers\.(1|10)\.mlp\.down_proj$" in block["dynamic"]


def test_a_quantized_mtp_layer_leaves_no_key_that_vllm_takes_for_its_exclusion(
    declare: Declare,
) -> None:
    block = quantization_config(declare(mtp=EIGHT))
    assert not any(key.startswith("-:") and "mtp" in key for key in block["dynamic"])
    assert declared_grid(block, "mtp.layers.0.self_attn.q_proj") == EIGHT
    assert declared_grid(block, "mtp.fc") is None


def test_an_mtp_layer_may_have_linears_that_the_trunk_keeps(declare: Declare) -> None:
    block = quantization_config(declare(lambda _, m: None if "self_attn" in m else GRID, mtp=GRID))
    listed = [name for names in block["modules_in_block_to_quantize"] for name in names]
    assert "mtp.layers.0.self_attn.q_proj" in listed
    assert "self_attn.q_proj" not in listed
    assert declared_grid(block, "mtp.layers.0.self_attn.q_proj") == GRID
    assert declared_grid(block, f"{TRUNK}.3.self_attn.q_proj") is None


def test_half_an_mtp_layer_cannot_be_said(declare: Declare) -> None:
    whole = declare(mtp=GRID)
    dense = "mtp.layers.0.mlp.down_proj"
    half = Declaration(
        default=GRID,
        grids={name: grid for name, grid in whole.grids.items() if name != dense},
        dense=(*whole.dense, dense),
        fused=whole.fused,
        block_lists=whole.block_lists,
        towers=(),
    )
    [reason] = refusals(half)
    assert "mlp.down_proj" in reason
    with pytest.raises(CheckpointError, match="quantize the whole MTP layer"):
        quantization_config(half)


@pytest.mark.parametrize("head", [GRID, EIGHT])
def test_a_quantized_head(declare: Declare, head: IntGrid) -> None:
    block = quantization_config(declare(lm_head=head))
    assert block["lm_head"] is True
    assert ["lm_head"] in block["modules_in_block_to_quantize"]
    assert block["dynamic"]["+:.*lm_head$"] == {"bits": head.bits, "group_size": head.group_size}
    assert "-:.*lm_head.*" not in block["dynamic"]
    assert declared_grid(block, "lm_head") == head


BLOCK: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]],
}
MODULE = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("changes", "module", "grid"),
    [
        ({}, MODULE, GRID),
        ({}, "model.layers.1.self_attn.q_proj", None),
        ({}, "mtp.layers.0.mlp.up_proj", GRID),  # a part of the name is enough
        ({"dynamic": None}, MODULE, GRID),
        ({"dynamic": {"-:.*mtp.*": {}}}, "mtp.layers.0.mlp.up_proj", None),
        ({"dynamic": {r"-:up_proj": {}}}, MODULE, GRID),  # patterns are matched from the start
        ({"dynamic": {r"+:.*up_proj": {"bits": 8}}}, MODULE, IntGrid(8, 128, True)),
        ({"dynamic": {r".*up_proj": {"group_size": 32}}}, MODULE, IntGrid(4, 32, True)),
        ({"dynamic": {"+:.*up.*": {"bits": 8}, "-:.*mlp.*": {}}}, MODULE, IntGrid(8, 128, True)),
        ({"dynamic": {"-:.*mlp.*": {}, "+:.*up.*": {"bits": 8}}}, MODULE, None),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, "model.layers.1.self_attn.q_proj", None),
        ({"lm_head": True}, "lm_head", None),  # vLLM wants it in the list as well
        ({"modules_in_block_to_quantize": ["lm_head"]}, "lm_head", None),
        ({"lm_head": True, "modules_in_block_to_quantize": ["lm_head"]}, "lm_head", GRID),
        ({"modules_in_block_to_quantize": ["mlp.up_proj"]}, MODULE, GRID),
        ({"desc_act": True, "group_size": -1}, MODULE, IntGrid(4, -1, True)),
    ],
)
def test_declared_grid_follows_the_engines_rules(
    changes: dict[str, Any], module: str, grid: IntGrid | None
) -> None:
    assert declared_grid({**BLOCK, **changes}, module) == grid


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"desc_act": True}, "desc_act true"),
        ({"dynamic": {"+:.*up.*": {"desc_act": True}}}, "desc_act true"),
        ({"sym": False}, "sym False"),
        ({"dynamic": {"+:.*up.*": {"sym": False}}}, "sym False"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"modules_in_block_to_quantize": None}, "lacks modules_in_block_to_quantize"),
        ({"bits": None}, "declares None bits"),
        ({"bits": 16}, "declares 16 bits"),
        ({"group_size": "128"}, "group_size '128'"),
        ({"dynamic": {"-:(": {}}}, "cannot be read"),
        ({"dynamic": {"+:.*": 3}}, "cannot be read"),
    ],
)
def test_blocks_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        declared_grid({**BLOCK, **changes}, MODULE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
