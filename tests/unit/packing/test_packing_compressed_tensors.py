from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.core.errors import CheckpointError
from nybble.packing import gptq_tensors
from nybble.packing.compressed_tensors import (
    SUFFIXES,
    declared_grid,
    pack,
    packed_specs,
    quantization_config,
    unpack,
)
from nybble.packing.format import Declaration
from nybble.quant.grid import IntGrid, QuantizedWeight
from nybble.quant.rtn import rtn

Declare = Callable[..., Declaration]
Config = dict[str, Any]

IN_BLOCK = "model.language_model.layers.10.mlp.gate_proj"
GRID = IntGrid(4, 128, True)


def any_weight(outs: int, ins: int, grid: IntGrid, seed: int = 0) -> QuantizedWeight:
    return rtn(torch.randn(outs, ins, generator=torch.Generator().manual_seed(seed)), grid)


# --- Tensors ---


def test_four_bits_as_known_from_other_packers() -> None:
    codes = torch.tensor([[-8, -3, 0, 1, 7, -1, 2, -6]], dtype=torch.int8)
    packed = pack("m", QuantizedWeight(codes, torch.tensor([[-1.5]]), IntGrid(4, -1, True)))
    assert packed["m.weight_packed"].tolist() == [[0x2A7F9850]]
    assert packed["m.weight_scale"].tolist() == [[-1.5]]
    assert packed["m.weight_shape"].tolist() == [1, 8]
    assert packed["m.weight_shape"].dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    outs=st.integers(1, 5),
    groups=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, -1]),
    seed=st.integers(0, 1000),
)
def test_unpacking_returns_what_was_packed(
    bits: int, outs: int, groups: int, group_size: int, seed: int
) -> None:
    ins = groups * (32 if group_size == -1 else group_size)
    grid = IntGrid(bits, group_size, True)
    quantized = any_weight(outs, ins, grid, seed)
    packed = pack("a.b", quantized)
    back = unpack("a.b", packed, grid)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert (back.codes.dtype, back.scales.dtype) == (torch.int8, torch.float32)
    specs = packed_specs("a.b", (outs, ins), grid)
    assert [spec.name for spec in specs] == [f"a.b.{suffix}" for suffix in SUFFIXES]
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.items()
    }
    assert all(tensor.is_contiguous() for tensor in packed.values())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_gptq_transposed(bits: int) -> None:
    quantized = any_weight(32, 96, IntGrid(bits, 32, True))
    ours, theirs = pack("m", quantized), gptq_tensors.pack("m", quantized)
    assert torch.equal(ours["m.weight_packed"], theirs["m.qweight"].T)
    assert torch.equal(ours["m.weight_scale"].float(), theirs["m.scales"].T.float())


def test_a_shape_that_is_not_that_of_the_codes_is_refused() -> None:
    packed = pack("m", any_weight(4, 64, GRID_32))
    packed["m.weight_shape"] = torch.tensor([64, 4])
    with pytest.raises(CheckpointError, match=r"^m\.weight_shape holds \[64, 4\]"):
        unpack("m", packed, GRID_32)


GRID_32 = IntGrid(4, 32, True)


def test_scales_that_bfloat16_cannot_hold_are_refused() -> None:
    codes, scales = torch.zeros(2, 8, dtype=torch.int8), torch.tensor([[1.0], [1 + 2.0**-10]])
    with pytest.raises(CheckpointError, match=r"scale of 1\.0009765625, which torch\.bfloat16"):
        pack("m", QuantizedWeight(codes, scales, IntGrid(4, -1, True)))


# --- The configuration block ---


def test_our_configuration_block(declare: Declare) -> None:
    block = quantization_config(declare())
    assert json.loads(json.dumps(block)) == block
    assert block == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
            }
        },
        "ignore": [
            "lm_head",
            r"re:.*linear_attn\.in_proj_(a|b|ba)$",
            "re:.*mtp.*",
            "re:.*visual.*",
        ],
    }


def test_one_scale_a_row_is_called_channel(declare: Declare) -> None:
    block = quantization_config(declare(lambda *_: IntGrid(8, -1, True)))
    assert block["config_groups"]["group_0"]["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert declared_grid(block, IN_BLOCK) == IntGrid(8, -1, True)


def test_each_grid_is_one_group(declare: Declare) -> None:
    eight = IntGrid(8, 128, True)
    block = quantization_config(
        declare(lambda _, member: eight if member == "mlp.down_proj" else GRID, mtp=GRID)
    )
    targets = [group["targets"] for group in block["config_groups"].values()]
    assert targets == [["Linear"], [r"re:.*model\.layers\.\d+\.mlp\.down_proj$"]]
    assert declared_grid(block, "model.language_model.layers.3.mlp.down_proj") == eight
    assert declared_grid(block, "mtp.layers.0.mlp.down_proj") == GRID


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_is_named_as_a_target(declare: Declare, bits: int) -> None:
    # vLLM's head is no Linear: without its name it would be built dense.
    head = IntGrid(bits, 128, True)
    block = quantization_config(declare(lm_head=head))
    assert "lm_head" not in block["ignore"]
    named = [
        group for group in block["config_groups"].values() if "re:.*lm_head$" in group["targets"]
    ]
    assert [group["weights"]["num_bits"] for group in named] == [bits]
    assert declared_grid(block, "lm_head") == head


def block_with(group: Config | None = None, weights: Config | None = None, **top: Any) -> Config:
    block: Config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    **(weights or {}),
                },
                **(group or {}),
            }
        },
        "ignore": ["lm_head"],
    }
    return {**block, **top}


@pytest.mark.parametrize(
    ("ignore", "grid"),
    [
        ([], GRID),
        ([IN_BLOCK], None),
        (["re:.*mlp.*"], None),
        (["re:mlp.*"], GRID),  # patterns are matched from the start
        (["model.language_model.layers.10.mlp"], GRID),  # a name is no beginning of names
        (["gate_proj"], GRID),
    ],
)
def test_ignored_names(ignore: list[str], grid: IntGrid | None) -> None:
    assert declared_grid(block_with(ignore=ignore), IN_BLOCK) == grid


@pytest.mark.parametrize(
    ("targets", "grid"),
    [
        (["Linear"], GRID),
        ([IN_BLOCK], GRID),
        ([r"re:.*gate_proj$"], GRID),
        ([r"re:.*up_proj$"], None),
        ([], None),
        (["Embedding"], None),
    ],
)
def test_targets(targets: list[str], grid: IntGrid | None) -> None:
    assert declared_grid(block_with(group={"targets": targets}), IN_BLOCK) == grid


def test_a_name_goes_before_the_class() -> None:
    block = block_with()
    named = {
        "targets": ["re:.*gate_proj$"],
        "weights": {**block["config_groups"]["group_0"]["weights"]},
    }
    named["weights"]["num_bits"] = 8
    block["config_groups"]["group_1"] = named
    assert declared_grid(block, IN_BLOCK) == IntGrid(8, 128, True)


def test_the_head_is_no_linear() -> None:
    assert declared_grid(block_with(ignore=[]), "lm_head") is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"weights": {"symmetric": False}}, "symmetric False"),
        ({"weights": {"type": "float"}}, "type 'float'"),
        ({"weights": {"strategy": "tensor"}}, "strategy 'tensor'"),
        ({"weights": {"actorder": "group"}}, "actorder 'group'"),
        ({"weights": {"dynamic": True}}, "dynamic True"),
        ({"format": "int-quantized"}, "format 'int-quantized'"),
        ({"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({"group": {"input_activations": {"num_bits": 8}}}, "input_activations"),
        ({"weights": {"num_bits": "4"}}, "'4' bits"),
        ({"weights": {"group_size": 0}}, "group_size 0"),
        ({"config_groups": {"group_0": {"targets": ["Linear"]}}}, "KeyError"),
        ({"config_groups": None}, "cannot be read"),
        ({"ignore": ["re:("]}, "cannot be read"),
    ],
)
def test_blocks_of_other_kinds_are_refused(changes: Config, key: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        declared_grid(block_with(**changes), IN_BLOCK)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
