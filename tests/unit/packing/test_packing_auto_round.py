from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.core.errors import CheckpointError
from nybble.packing.auto_round import (
    SUFFIXES,
    declared_grid,
    pack,
    packed_specs,
    quantization_config,
    unpack,
)
from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.rtn import rtn


def weight_of_rows(row: list[int], outs: int, bits: int) -> QuantizedWeight:
    """Every one of ``outs`` rows holds the same codes, under the scales 1, 2, 3..."""
    codes = torch.tensor([row] * outs, dtype=torch.int8)
    scales = torch.arange(1, outs + 1, dtype=torch.float32)[:, None]
    return QuantizedWeight(codes, scales, IntGrid(bits, -1, True))


def any_weight(outs: int, ins: int, grid: IntGrid, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    return rtn(torch.randn(outs, ins, generator=generator), grid)


# --- What real packers of the format write ---


def test_four_bits_as_known_from_other_packers() -> None:
    packed = pack("m", weight_of_rows([-8, -3, 0, 1, 7, -1, 2, -6], outs=8, bits=4))
    assert packed["m.qweight"].tolist() == [[0x2A7F9850] * 8]
    assert packed["m.qweight"][0, 0].item() == 713005136
    assert packed["m.qzeros"].tolist() == [[2004318071]]
    assert packed["m.qzeros"][0, 0].item() == 0x77777777
    assert packed["m.scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]


def test_eight_bits_as_known_from_other_packers() -> None:
    packed = pack("m", weight_of_rows([-128, -3, 0, 127], outs=4, bits=8))
    assert packed["m.qweight"].tolist() == [[-8356608] * 4]
    assert packed["m.qzeros"].tolist() == [[2139062143]]
    assert packed["m.qzeros"][0, 0].item() == 0x7F7F7F7F


def test_two_bits() -> None:
    packed = pack("m", weight_of_rows([-2, -1, 0, 1] * 4, outs=16, bits=2))
    assert packed["m.qweight"].tolist() == [[0b11100100 * 0x01010101 - 2**32] * 16]
    assert packed["m.qzeros"].tolist() == [[0x55555555]]


def test_words_run_along_the_inputs_and_columns_are_outputs() -> None:
    codes = torch.zeros(8, 16, dtype=torch.int8)
    codes[3, 9] = 5  # output 3, input 9: second word, second lane
    packed = pack("m", QuantizedWeight(codes, torch.ones(8, 1), IntGrid(4, -1, True)))
    words = packed["m.qweight"]
    assert words.shape == (2, 8)
    differing = (words != words[0, 0]).nonzero().tolist()
    assert differing == [[1, 3]]
    assert (words[1, 3].item() >> 4) & 15 == 5 + 8


def test_scales_are_stored_by_group_then_output() -> None:
    scales = torch.tensor([[1.0, 2.0], [-3.0, 4.0]] * 4)
    codes = torch.zeros(8, 16, dtype=torch.int8)
    packed = pack("m", QuantizedWeight(codes, scales, IntGrid(4, 8, True)))
    assert packed["m.scales"].tolist() == [[1, -3] * 4, [2, 4] * 4]
    assert packed["m.scales"].dtype == torch.float16


# --- Round trip ---


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    signed=st.booleans(),
    out_words=st.integers(1, 3),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 1000),
)
def test_unpacking_returns_what_was_packed(
    bits: int, signed: bool, out_words: int, groups: int, group_size: int, seed: int
) -> None:
    ins = groups * (32 if group_size == -1 else group_size)
    grid = IntGrid(bits, group_size, signed)
    quantized = any_weight(out_words * 32 // bits, ins, grid, seed)
    packed = pack("a.b", quantized)
    back = unpack("a.b", packed, grid)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.codes.dtype, back.scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    specs = packed_specs("a.b", (quantized.codes.shape[0], ins), grid)
    assert [spec.name for spec in specs] == [f"a.b.{suffix}" for suffix in SUFFIXES]
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


def test_specs_of_a_real_shape() -> None:
    specs = packed_specs("q_proj", (1024, 512), IntGrid(4, 128, True))
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        ("q_proj.qweight", torch.int32, (64, 1024)),
        ("q_proj.qzeros", torch.int32, (4, 128)),
        ("q_proj.scales", torch.float16, (4, 1024)),
    ]


@pytest.mark.parametrize(("bits", "wrong"), [(4, 0), (4, -2004318072), (8, -2139062144), (2, 0)])
def test_other_zero_points_are_refused(bits: int, wrong: int) -> None:
    grid = IntGrid(bits, 32, True)
    packed = pack("m", any_weight(16, 64, grid))
    packed["m.qzeros"][0, 0] = wrong
    with pytest.raises(CheckpointError, match=r"^m\.qzeros holds"):
        unpack("m", packed, grid)


def test_one_wrong_zero_point_among_many_is_refused() -> None:
    grid = IntGrid(4, 32, True)
    packed = pack("m", any_weight(16, 64, grid))
    packed["m.qzeros"][-1, -1] ^= 1 << 28
    with pytest.raises(CheckpointError, match=r"m\.qzeros"):
        unpack("m", packed, grid)


@pytest.mark.parametrize("bad", [8, -9])
def test_codes_outside_the_grid_are_not_packed(bad: int) -> None:
    quantized = weight_of_rows([0, 1, 2, 3, 4, 5, 6, bad], outs=8, bits=4)
    with pytest.raises(ValueError, match="outside"):
        pack("m", quantized)


# --- The configuration block ---

TRUNK = "model.language_model.layers"
OUR_CONFIG = quantization_config(TRUNK, IntGrid(4, 128, True))
GRID = IntGrid(4, 128, True)


def config_with(**changes: Any) -> dict[str, Any]:
    config = quantization_config(TRUNK, GRID)
    config.update(changes)
    return config


def test_our_configuration_block() -> None:
    assert json.loads(json.dumps(OUR_CONFIG)) == OUR_CONFIG
    extra = OUR_CONFIG["extra_config"]
    assert {key: value for key, value in OUR_CONFIG.items() if key != "extra_config"} == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": TRUNK,
    }
    assert all(value == {"bits": 16, "data_type": "fp"} for value in extra.values())


def test_the_configuration_block_declares_the_grid_it_was_made_for() -> None:
    config = quantization_config("model.layers", IntGrid(8, -1, True))
    assert declared_grid(config, "model.layers.0.mlp.up_proj") == IntGrid(8, -1, True)


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
def test_trunk_linears_are_declared_quantized(module: str) -> None:
    assert declared_grid(OUR_CONFIG, module) == GRID


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
def test_everything_else_is_declared_dense(module: str, blocks: str | None) -> None:
    # Without the list of blocks as well: not every engine reads it.
    assert declared_grid(config_with(block_name_to_quantize=blocks), module) is None


@pytest.mark.parametrize(
    "blocks", ["model.layers", "other.layers,model.layers", ["other.layers", "model.layers"]]
)
def test_blocks_may_be_a_name_or_a_list_in_either_form(blocks: str | list[str]) -> None:
    config = config_with(block_name_to_quantize=blocks, extra_config={})
    assert declared_grid(config, "model.layers.0.mlp.up_proj") == GRID
    assert declared_grid(config, "audio.layers.0.mlp.up_proj") is None


def test_a_block_name_is_a_prefix_not_a_part() -> None:
    config = config_with(block_name_to_quantize="layers", extra_config={})
    assert declared_grid(config, "model.layers.0.mlp.up_proj") is None


@pytest.mark.parametrize("blocks", [None, "", []])
def test_without_blocks_everything_but_the_head_is_quantized(blocks: object) -> None:
    config = config_with(block_name_to_quantize=blocks, extra_config={})
    assert declared_grid(config, "anything.at.all") == GRID
    assert declared_grid(config, "lm_head") is None


def test_an_exact_key_goes_before_all_other_rules() -> None:
    eight = {"bits": 8, "group_size": 64}
    names = ["mtp.fc", "lm_head", "outside.of.all.blocks"]
    config = config_with(extra_config={".*": {"bits": 16}, **dict.fromkeys(names, eight)})
    for name in names:
        assert declared_grid(config, name) == IntGrid(8, 64, True)


def test_an_exact_key_takes_what_it_lacks_from_the_default() -> None:
    module = f"{TRUNK}.0.mlp.up_proj"
    config = config_with(extra_config={module: {"bits": 8}})
    assert declared_grid(config, module) == IntGrid(8, 128, True)
    assert declared_grid(config, f"{TRUNK}.1.mlp.up_proj") == GRID


def test_an_exact_key_without_bits_means_sixteen() -> None:
    module = f"{TRUNK}.0.mlp.up_proj"
    config = config_with(extra_config={module: {"data_type": "fp", "group_size": 32}})
    assert declared_grid(config, module) is None


def test_a_regular_expression_goes_before_the_default() -> None:
    config = config_with(extra_config={r".*\.mlp\..*": {"bits": 8, "group_size": -1}})
    assert declared_grid(config, f"{TRUNK}.0.mlp.up_proj") == IntGrid(8, -1, True)
    assert declared_grid(config, f"{TRUNK}.0.self_attn.q_proj") == GRID


def test_the_first_regular_expression_that_matches_decides() -> None:
    extra = {r".*up_proj$": {"bits": 8}, r".*mlp.*": {"bits": 2}}
    config = config_with(extra_config=extra)
    assert declared_grid(config, f"{TRUNK}.0.mlp.up_proj") == IntGrid(8, 128, True)
    assert declared_grid(config, f"{TRUNK}.0.mlp.down_proj") == IntGrid(2, 128, True)


def test_a_block_without_exceptions() -> None:
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
def test_other_formats_are_refused(changes: dict[str, Any]) -> None:
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
