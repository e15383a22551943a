from __future__ import annotations

import pytest
from support.checkpoints import MTP_SHAPES, Tiny, quantized_modules, tiny_config

from nybble.arch.registry import architecture_of
from nybble.engine.declare import declaration, linears
from nybble.quant.grid import IntGrid

W4, W8 = IntGrid(4, 128, True), IntGrid(8, 32, True)
MTP_LAYER = {
    name.removesuffix(".weight")
    for name, shape in MTP_SHAPES.items()
    if len(shape) == 2 and name.startswith("mtp.layers.")
}
IN_PROJ_BA = {f"{{}}layers.{block}.linear_attn.in_proj_{x}" for block in range(3) for x in "ab"}


@pytest.mark.parametrize("wrapper", [True, False])
def test_every_linear_is_named_once(wrapper: bool) -> None:
    tiny = Tiny(wrapper=wrapper)
    names = list(linears(architecture_of(tiny_config(tiny))))
    kept = {name.format(tiny.prefix) for name in IN_PROJ_BA}
    assert len(names) == len(set(names))
    assert set(names) == quantized_modules(tiny.prefix) | kept | MTP_LAYER | {"mtp.fc", "lm_head"}


def test_a_tied_head_is_a_linear_all_the_same() -> None:
    names = list(linears(architecture_of(tiny_config(Tiny(tied=True, mtp=False)))))
    assert names.count("lm_head") == 1
    assert not any(name.startswith("mtp.") or "embed" in name for name in names)


def test_what_has_no_grid_is_dense() -> None:
    arch, quantized = architecture_of(tiny_config(Tiny())), quantized_modules(Tiny().prefix)
    made = declaration(arch, dict.fromkeys(quantized, W4))
    assert made.default == W4
    assert set(made.grids) == quantized
    assert set(made.dense) == set(linears(arch)) - quantized
    assert made.block_lists == ("model.language_model.layers",)
    assert made.towers == ("visual",)
    assert made.fused["self_attn.qkv_proj"] == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
    )
    assert set(made.fused["linear_attn.in_proj_ba"]) == {
        "linear_attn.in_proj_a",
        "linear_attn.in_proj_b",
    }


def test_a_quantized_mtp_layer_adds_its_list_but_does_not_vote() -> None:
    tiny = Tiny(wrapper=False)
    arch = architecture_of(tiny_config(tiny))
    some = {name: W4 for name in quantized_modules(tiny.prefix) if name.endswith("down_proj")}
    made = declaration(arch, some | dict.fromkeys(MTP_LAYER, W8))
    assert made.default == W4
    assert made.block_lists == ("model.layers", "mtp.layers")
    assert made.grids["mtp.layers.0.mlp.up_proj"] == W8


def test_the_order_of_grids_does_not_matter() -> None:
    arch, names = architecture_of(tiny_config(Tiny())), sorted(quantized_modules(Tiny().prefix))
    grids = {name: W8 if "mlp" in name else W4 for name in names}
    one = declaration(arch, grids)
    other = declaration(arch, dict(reversed(grids.items())))
    assert one == other
    assert list(one.grids) == list(other.grids)
