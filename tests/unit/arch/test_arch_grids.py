"""The grid of every Linear, and the fate of every tensor, under schemes that say more than bits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import (
    MTP_SHAPES,
    WRAPPER_PREFIX,
    Tiny,
    quantized_modules,
    tiny_config,
    tiny_tensors,
)

from nybble.arch.plan import Keep, Quantize, TensorPlan, plan_tensors
from nybble.arch.registry import architecture_of
from nybble.checkpoint.dtypes import SAFETENSORS_DTYPES
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import RecipeError
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Override, Scheme

TINY = Tiny()
LAYERS = f"{WRAPPER_PREFIX}layers"
MODULES = quantized_modules(WRAPPER_PREFIX)
MTP_LINEARS = {
    name.removesuffix(".weight")
    for name, shape in MTP_SHAPES.items()
    if name.startswith("mtp.layers.") and len(shape) == 2
}
DEFAULT = IntGrid(4, 128, True)


@cache
def index_of(tiny: Tiny) -> CheckpointIndex:
    infos = {
        name: TensorInfo(
            name, SAFETENSORS_DTYPES[t.dtype], tuple(t.shape), Path("model.safetensors"), 0, 0
        )
        for name, t in tiny_tensors(tiny).items()
    }
    return CheckpointIndex(Path("base"), infos)


def plan_of(tiny: Tiny = TINY, **values: Any) -> TensorPlan:
    return plan_tensors(architecture_of(tiny_config(tiny)), index_of(tiny), Scheme(**values))


def overridden(*overrides: Override) -> TensorPlan:
    return plan_of(overrides=overrides)


def refused(tiny: Tiny = TINY, **values: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        plan_of(tiny, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_overrides(*overrides: Override) -> str:
    return refused(overrides=overrides)


def named(part: str) -> set[str]:
    return {module for module in MODULES if part in module}


def test_without_overrides_all_have_the_schemes_grid() -> None:
    assert plan_of().grids() == dict.fromkeys(MODULES, DEFAULT)
    unsigned = plan_of(bits=2, group_size=64, signed_scales=False)
    assert unsigned.grids() == dict.fromkeys(MODULES, IntGrid(2, 64, False))


def test_kept_linears_are_copied_as_the_recipe_says() -> None:
    plan = overridden(Override(match=r"\.self_attn\.", keep=True))
    assert plan.grids() == dict.fromkeys(MODULES - named("self_attn"), DEFAULT)
    for module in named("self_attn"):
        assert plan.fates[f"{module}.weight"] == Keep("attention", "as the recipe says")


def test_every_tensor_keeps_its_one_fate() -> None:
    plain = plan_of()
    plan = overridden(
        Override(match=r"layers\.0\.", keep=True), Override(match=r"\.down_proj", bits=8)
    )
    assert list(plan.fates) == list(plain.fates)
    for name, fate in plan.fates.items():
        if name.removesuffix(".weight") not in MODULES:
            assert fate == plain.fates[name]
        elif f"{LAYERS}.0." in name:
            assert isinstance(fate, Keep)
            assert fate.reason == "as the recipe says"
            assert fate.part == plain.fates[name].part
        else:
            assert isinstance(fate, Quantize)
            assert fate.grid.bits == (8 if "down_proj" in name else 4)
    assert plan.quantized(0) == {}


@pytest.mark.parametrize(
    ("values", "grid"),
    [
        ({"bits": 8}, IntGrid(8, 128, True)),
        ({"group_size": 32}, IntGrid(4, 32, True)),
        ({"group_size": -1}, IntGrid(4, -1, True)),
        ({"bits": 3, "group_size": 64}, IntGrid(3, 64, True)),
    ],
)
def test_an_override_changes_what_it_names_and_no_more(
    values: dict[str, Any], grid: IntGrid
) -> None:
    plan = overridden(Override(match=r"\.o_proj$", **values))
    expected = dict.fromkeys(MODULES, DEFAULT) | {f"{LAYERS}.3.self_attn.o_proj": grid}
    assert plan.grids() == expected


def test_the_first_override_that_matches_wins() -> None:
    plan = overridden(
        Override(match=r"layers\.1\.mlp\.down_proj", keep=True),
        Override(match=r"mlp\.down_proj", bits=8),
        Override(match=r"mlp\.", bits=3),
    )
    grids = plan.grids()
    assert f"{LAYERS}.1.mlp.down_proj" not in grids
    assert grids[f"{LAYERS}.2.mlp.down_proj"].bits == 8
    assert grids[f"{LAYERS}.1.mlp.up_proj"].bits == 3
    assert grids[f"{LAYERS}.1.linear_attn.out_proj"].bits == 4


def test_a_match_is_searched_for_anywhere_in_the_name() -> None:
    plan = overridden(Override(match="attn.o_", bits=8))
    assert plan.grids()[f"{LAYERS}.3.self_attn.o_proj"].bits == 8


@pytest.mark.parametrize(
    "match",
    [
        "nothing",
        r"layers\.4\.",
        "mtp",
        r"^mtp\.layers\.0\.",
        "lm_head",
        "embed_tokens",
        "visual",
        r"\.weight$",
        "in_proj_a",
        "norm",
    ],
)
def test_an_override_that_decides_for_nothing_is_refused(match: str) -> None:
    message = refused_overrides(Override(match=match, bits=8))
    assert f"{match!r} decides for no Linear" in message
    assert "scheme.mtp_bits" in message
    assert "scheme.lm_head_bits" in message


def test_an_override_that_earlier_ones_leave_nothing_is_refused() -> None:
    first, second = Override(match="mlp", keep=True), Override(match="gate|up_proj", bits=8)
    assert overridden(second).grids()[f"{LAYERS}.0.mlp.up_proj"].bits == 8
    assert "'gate|up_proj' decides for no Linear" in refused_overrides(first, second)


@pytest.mark.parametrize(
    ("match", "caught", "missed"),
    [
        ("q_proj", "self_attn.q_proj", "self_attn.k_proj"),
        ("k_proj", "self_attn.k_proj", "self_attn.q_proj"),
        ("[qk]_proj", "self_attn.q_proj", "self_attn.v_proj"),
        ("gate_proj", "mlp.gate_proj", "mlp.up_proj"),
        ("up_proj", "mlp.up_proj", "mlp.gate_proj"),
        ("in_proj_qkv", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        ("in_proj_z", "linear_attn.in_proj_z", "linear_attn.in_proj_qkv"),
    ],
)
@pytest.mark.parametrize("values", [{"keep": True}, {"bits": 8}, {"bits": 4}], ids=str)
def test_an_override_that_parts_fused_linears_is_refused(
    match: str, caught: str, missed: str, values: dict[str, Any]
) -> None:
    message = refused_overrides(Override(match=match, **values))
    block = 0 if "self_attn" not in caught else 3
    assert f"{match!r} decides for {LAYERS}.{block}.{caught} but not for" in message
    assert f"{LAYERS}.{block}.{missed}" in message


def test_two_overrides_that_part_fused_linears_are_refused() -> None:
    message = refused_overrides(
        Override(match="gate_proj", bits=8), Override(match="up_proj", bits=3)
    )
    assert "'gate_proj' decides for" in message
    assert "mlp.up_proj" in message


def test_an_override_of_a_whole_fused_group_is_taken() -> None:
    grids = overridden(Override(match=r"\.[qkv]_proj", bits=8)).grids()
    assert {m.rpartition(".")[2] for m, grid in grids.items() if grid.bits == 8} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mtp_layer_has_the_schemes_groups_and_bits_of_its_own(bits: int) -> None:
    plan = plan_of(bits=3, group_size=64, mtp_bits=bits)
    expected = dict.fromkeys(MODULES, IntGrid(3, 64, True))
    assert plan.grids() == expected | dict.fromkeys(MTP_LINEARS, IntGrid(bits, 64, True))
    assert len(MTP_LINEARS) == 7
    assert set(plan.quantized(4)) == {f"{module}.weight" for module in MTP_LINEARS}
    assert set(MTP_SHAPES) - set(plan.quantized(4)) == {n for n, _ in plan.kept() if "mtp" in n}
    assert isinstance(plan.fates["mtp.fc.weight"], Keep)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_output_head_has_bits_of_its_own(bits: int) -> None:
    plan = plan_of(bits=2, group_size=32, lm_head_bits=bits)
    grid = IntGrid(bits, 32, True)
    assert plan.grids() == dict.fromkeys(MODULES, IntGrid(2, 32, True)) | {"lm_head": grid}
    assert plan.fates["lm_head.weight"] == Quantize(("lm_head",), 5, "lm_head", grid)


def test_overrides_do_not_reach_the_heads() -> None:
    plan = plan_of(
        mtp_bits=4,
        lm_head_bits=8,
        overrides=(Override(match="down_proj", bits=2), Override(match=".", keep=True)),
    )
    grids = plan.grids()
    assert grids.pop("lm_head") == IntGrid(8, 128, True)
    for module in MTP_LINEARS:
        assert grids.pop(module) == DEFAULT
    assert grids == dict.fromkeys(named("down_proj"), IntGrid(2, 128, True))


def test_an_output_head_that_is_the_embedding_is_not_quantized() -> None:
    message = refused(Tiny(tied=True), lm_head_bits=8)
    assert "scheme.lm_head_bits" in message
    assert "tie_word_embeddings" in message


def test_a_head_that_is_not_there_is_not_quantized() -> None:
    message = refused(Tiny(mtp=False), mtp_bits=4)
    assert "scheme.mtp_bits" in message
    assert "no MTP head" in message


@pytest.mark.parametrize("heads", [{}, {"mtp_bits": 4, "lm_head_bits": 8}], ids=str)
def test_a_scheme_that_keeps_every_block_is_refused(heads: dict[str, Any]) -> None:
    keep = (Override(match="mlp", keep=True), Override(match="attn", keep=True))
    assert "keeps every Linear" in refused(overrides=keep, **heads)
