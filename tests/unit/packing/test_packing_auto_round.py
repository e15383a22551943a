from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nybble.core.errors import CheckpointError
from nybble.packing.auto_round import declared_grid, quantization_config
from nybble.packing.format import Declaration
from nybble.quant.grid import IntGrid

Declare = Callable[..., Declaration]

TRUNK = "model.language_model.layers"
GRID = IntGrid(4, 128, True)


@pytest.fixture
def config_with(declare: Declare) -> Callable[..., dict[str, Any]]:
    """Our block with other values."""
    return lambda **changes: {**quantization_config(declare()), **changes}


def test_our_configuration_block(declare: Declare) -> None:
    block = quantization_config(declare())
    assert json.loads(json.dumps(block)) == block
    assert block == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": TRUNK,
        "extra_config": {
            pattern: {"bits": 16, "data_type": "fp"}
            for pattern in (r".*linear_attn\.in_proj_(a|b|ba)$", ".*mtp.*", ".*visual.*")
        },
    }


def test_a_quantized_head_and_mtp_layer(declare: Declare) -> None:
    block = quantization_config(declare(mtp=IntGrid(8, 32, True), lm_head=IntGrid(8, -1, True)))
    assert block["block_name_to_quantize"] == [TRUNK, "mtp.layers"]
    eight = {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"}
    assert block["extra_config"]["lm_head"] == eight
    assert ".*mtp.*" not in block["extra_config"]
    assert declared_grid(block, "mtp.fc") is None
    assert declared_grid(block, "mtp.layers.0.self_attn.q_proj") == IntGrid(8, 32, True)
    assert declared_grid(block, "lm_head") == IntGrid(8, -1, True)


def test_the_configuration_block_declares_the_grid_it_was_made_for(declare: Declare) -> None:
    eight = IntGrid(8, -1, True)
    config = quantization_config(declare(lambda *_: eight, trunk="model.layers"))
    assert declared_grid(config, "model.layers.0.mlp.up_proj") == eight


@pytest.mark.parametrize(
    "module",
    [
        f"{TRUNK}.0.self_attn.q_proj",
        f"{TRUNK}.3.self_attn.qkv_proj",
        f"{TRUNK}.11.mlp.down_proj",
        f"{TRUNK}.2.mlp.gate_up_proj",
        f"{TRUNK}.1.linear_attn.in_proj_all",
        f"{TRUNK}.1.linear_attn.in_proj_qkv",
        f"{TRUNK}.1.linear_attn.in_proj_z",
        f"{TRUNK}.1.linear_attn.in_proj_qkvz",
        f"{TRUNK}.1.linear_attn.out_proj",
    ],
)
def test_trunk_linears_are_declared_quantized(module: str, config_with: Callable[..., Any]) -> None:
    assert declared_grid(config_with(), module) == GRID


@pytest.mark.parametrize("blocks", [TRUNK, None])
@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "mtp.fc",
        "mtp.layers.0.self_attn.q_proj",
        "mtp.layers.0.mlp.down_proj",
        "model.visual.blocks.0.attn.qkv",
        "model.visual.merger.linear_fc1",
        f"{TRUNK}.0.linear_attn.in_proj_a",
        f"{TRUNK}.0.linear_attn.in_proj_b",
        f"{TRUNK}.0.linear_attn.in_proj_ba",
    ],
)
def test_everything_else_is_declared_dense(
    module: str, blocks: str | None, config_with: Callable[..., Any]
) -> None:
    # Without the list of blocks as well: not every engine reads it.
    assert declared_grid(config_with(block_name_to_quantize=blocks), module) is None


@pytest.mark.parametrize(
    "blocks", ["model.layers", "other.layers,model.layers", ["other.layers", "model.layers"]]
)
def test_blocks_may_be_a_name_or_a_list_in_either_form(
    blocks: str | list[str], config_with: Callable[..., Any]
) -> None:
    config = config_with(block_name_to_quantize=blocks, extra_config={})
    assert declared_grid(config, "model.layers.0.mlp.up_proj") == GRID
    assert declared_grid(config, "audio.layers.0.mlp.up_proj") is None


def test_a_block_name_is_a_prefix_not_a_part(config_with: Callable[..., Any]) -> None:
    config = config_with(block_name_to_quantize="layers", extra_config={})
    assert declared_grid(config, "model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("blocks", [None, "", []])
def test_without_blocks_everything_but_the_head_is_quantized(
    blocks: object, config_with: Callable[..., Any]
) -> None:
    config = config_with(block_name_to_quantize=blocks, extra_config={})
    assert declared_grid(config, "anything.at.all") == GRID
    assert declared_grid(config, "lm_head") is None


def test_an_exact_key_goes_before_all_other_rules(config_with: Callable[..., Any]) -> None:
    eight = {"bits": 8, "group_size": 64}
    names = ["mtp.fc", "lm_head", "outside.of.all.blocks"]
    config = config_with(extra_config={".*": {"bits": 16}, **dict.fromkeys(names, eight)})
    for name in names:
        assert declared_grid(config, name) == IntGrid(8, 64, True)


def test_an_exact_key_takes_what_it_lacks_from_the_default(config_with: Callable[..., Any]) -> None:
    module = f"{TRUNK}.0.mlp.up_proj"
    config = config_with(extra_config={module: {"bits": 8}})
    assert declared_grid(config, module) == IntGrid(8, 128, True)
    assert declared_grid(config, f"{TRUNK}.1.mlp.up_proj") == GRID


def test_an_exact_key_without_bits_means_sixteen(config_with: Callable[..., Any]) -> None:
    module = f"{TRUNK}.0.mlp.up_proj"
    config = config_with(extra_config={module: {"data_type": "fp", "group_size": 32}})
    assert declared_grid(config, module) is None


def test_a_regular_expression_goes_before_the_default(config_with: Callable[..., Any]) -> None:
    config = config_with(extra_config={r".*\.mlp\..*": {"bits": 8, "group_size": -1}})
    assert declared_grid(config, f"{TRUNK}.0.mlp.up_proj") == IntGrid(8, -1, True)
    assert declared_grid(config, f"{TRUNK}.0.self_attn.q_proj") == GRID


def test_the_first_regular_expression_that_matches_decides(config_with: Callable[..., Any]) -> None:
    extra = {r".*up_proj$": {"bits": 8}, r".*mlp.*": {"bits": 2}}
    config = config_with(extra_config=extra)
    assert declared_grid(config, f"{TRUNK}.0.mlp.up_proj") == IntGrid(8, 128, True)
    assert declared_grid(config, f"{TRUNK}.0.mlp.down_proj") == IntGrid(2, 128, True)


def test_a_block_without_exceptions(config_with: Callable[..., Any]) -> None:
    config = config_with()
    del config["extra_config"]
    assert declared_grid(config, f"{TRUNK}.0.mlp.up_proj") == GRID


@pytest.mark.parametrize(
    "changes",
    [
        {"packing_format": "auto_round:auto_awq"},
        {"packing_format": "auto_gptq"},
        {"packing_format": None},
        {"sym": False},
        {"sym": None},
    ],
)
def test_other_formats_are_refused(
    changes: dict[str, Any], config_with: Callable[..., Any]
) -> None:
    config = config_with(**changes)
    for module in (f"{TRUNK}.0.mlp.up_proj", "lm_head"):
        with pytest.raises(CheckpointError, match="only symmetric"):
            declared_grid(config, module)


def test_a_block_of_another_quantizer_is_refused() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    with pytest.raises(CheckpointError, match="packing_format None"):
        declared_grid(gptq, "model.layers.0.mlp.up_proj")


BLOCKS = {
    "packing_format": "auto_round:auto_gptq",
    "sym": True,
    "bits": 4,
    "group_size": 128,
    "block_name_to_quantize": "model.layers",
}
IN_BLOCK = "model.layers.10.mlp.gate_proj"


@pytest.mark.parametrize(
    ("extra", "module", "bits"),
    [
        ({"model.layers.10.mlp.gate": {"bits": 16}}, IN_BLOCK, 4),  # a name, not a pattern
        ({"gate_proj": {"bits": 8}}, IN_BLOCK, 8),  # the end of a name
        ({".*gate.*": {"group_size": 64}}, IN_BLOCK, 4),  # a pattern without bits: the default's
        ({IN_BLOCK: {}}, IN_BLOCK, None),  # an exact key without bits: 16
        ({"*gate": {"bits": 16}}, IN_BLOCK, 4),  # no regular expression: skipped
        ({".*mtp.*": {"bits": 8}}, "mtp.fc", 8),  # patterns reach beyond the blocks
        ({}, "mtp.fc", None),
        (None, IN_BLOCK, 4),
    ],
)
def test_declared_grid_follows_the_engines_rules(
    extra: dict[str, dict[str, int]] | None, module: str, bits: int | None
) -> None:
    grid = declared_grid({**BLOCKS, "extra_config": extra}, module)
    assert (grid.bits if grid else None) == bits


def test_a_block_without_bits_is_one_line() -> None:
    with pytest.raises(CheckpointError, match="cannot be read: KeyError"):
        declared_grid({"packing_format": "auto_round:auto_gptq", "sym": True}, IN_BLOCK)
