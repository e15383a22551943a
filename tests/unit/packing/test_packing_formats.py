from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nybble.core.errors import CheckpointError
from nybble.packing.format import Declaration
from nybble.packing.formats import FORMATS, format_of
from nybble.quant.grid import IntGrid

Declare = Callable[..., Declaration]

TRUNK = "model.language_model.layers"
W4, W8, W3 = IntGrid(4, 128, True), IntGrid(8, -1, True), IntGrid(3, 64, True)
SHAPES: dict[str, tuple[Callable[[int, str], IntGrid | None], IntGrid | None, IntGrid | None]] = {
    "all alike": (lambda *_: W4, None, None),
    "other bits": (lambda *_: W3, None, None),
    "attention dense": (lambda _, m: None if m.startswith("self_attn") else W4, None, None),
    "recurrence dense": (lambda _, m: None if m.startswith("linear_attn") else W4, None, None),
    "by kind": (lambda _, m: W4 if m.startswith("mlp") else W8, None, None),
    "by number": (lambda b, _: W8 if b in (0, 11) else W4, None, None),
    "blocks dense": (lambda b, _: None if b in (0, 1, 10) else W4, None, None),
    "three kinds": (
        lambda b, m: None if b == 2 and "in_proj" in m else W8 if "down" in m else W4,
        W3,
        W8,
    ),
    "MTP alike": (lambda *_: W4, W4, None),
    "MTP other": (lambda b, _: None if b == 0 else W4, W8, None),
    "MTP alone has attention": (lambda _, m: None if "self_attn" in m else W4, W4, None),
    "head": (lambda *_: W4, None, W8),
    "head alike": (lambda *_: W8, None, W8),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trunk", [TRUNK, "model.layers"])
def test_a_block_declares_what_it_was_made_from(
    declare: Declare, name: str, shape: str, trunk: str
) -> None:
    grid_of, mtp, head = SHAPES[shape]
    declaration = declare(grid_of, mtp, head, trunk)
    chosen = FORMATS[name]
    assert chosen.refusals(declaration) == []
    block = chosen.quantization_config(declaration)
    for module in (*declaration.grids, *declaration.dense):
        assert chosen.declared_grid(block, module) == declaration.grids.get(module), module
    assert chosen.declared_grid(block, "model.visual.blocks.0.attn.qkv") is None


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_a_config_is_that_of_its_block(declare: Declare, name: str) -> None:
    block = FORMATS[name].quantization_config(declare())
    assert format_of({"quantization_config": block}) is FORMATS[name]
    assert FORMATS[name].name == name


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}])
def test_a_base_has_no_format(config: dict[str, Any]) -> None:
    assert format_of(config) is None


@pytest.mark.parametrize(
    "block", [{}, {"quant_method": "awq"}, {"quant_method": ["gptq"]}, "gptq", 4]
)
def test_other_blocks_are_refused_in_one_line(block: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"^config\.json has a quantization_config of"
    ) as caught:
        format_of({"quantization_config": block})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("grid_of", "reason"),
    [
        (lambda *_: IntGrid(5, 128, True), "not 5"),
        (
            lambda _, m: None if m == "mlp.up_proj" else W4,
            "engines fuse them into mlp.gate_up_proj",
        ),
        (
            lambda _, m: W8 if m == "self_attn.k_proj" else W4,
            "engines fuse them into self_attn.qkv",
        ),
    ],
)
def test_what_engines_cannot_build_is_refused(
    declare: Declare, name: str, grid_of: Callable[[int, str], IntGrid | None], reason: str
) -> None:
    declaration = declare(grid_of)
    [found] = FORMATS[name].refusals(declaration)
    assert reason in found
    with pytest.raises(CheckpointError):
        FORMATS[name].quantization_config(declaration)


@pytest.mark.parametrize("name", FORMATS)
def test_the_fusion_of_the_mtp_head_stays_dense(declare: Declare, name: str) -> None:
    whole = declare(mtp=W4)
    grids = {**whole.grids, "mtp.fc": W4}
    fused = Declaration(W4, grids, whole.dense, whole.fused, whole.block_lists, ())
    [found] = FORMATS[name].refusals(fused)
    assert found.startswith("mtp.fc is quantized")
