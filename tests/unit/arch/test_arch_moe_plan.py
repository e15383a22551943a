"""What becomes of the tensors of mixtures of experts, whichever way they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.moe_checkpoints import (
    BLOCKS,
    DENSE_BLOCK,
    EXPERTS,
    HIDDEN,
    INNER,
    Moe,
    model_tensors,
    moe_config,
    moe_tensors,
)

from nybble.arch.blocks import expected_shapes
from nybble.arch.grids import linear_groups
from nybble.arch.plan import Keep, Quantize, TensorPlan, plan_tensors
from nybble.arch.registry import architecture_in, architecture_of
from nybble.arch.spec import Architecture
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import (
    CheckpointError,
    NybbleError,
    PlanError,
    RecipeError,
    UnsupportedArchitecture,
)
from nybble.recipe.schema import Override, Scheme

QWEN3_5, QWEN3_5_TEXT, NEXT = (
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3NextForCausalLM",
)
FORMS = [
    Moe(QWEN3_5),
    Moe(QWEN3_5, form="one by one", mtp="stacks"),
    Moe(QWEN3_5_TEXT, mtp=None),
    Moe(NEXT, form="one by one"),
    Moe(NEXT, form="stacks", mtp="stacks"),
    Moe(NEXT, form="one by one", mtp=None),
]
each_form = pytest.mark.parametrize("moe", FORMS, ids=lambda m: f"{m.name} {m.form}, {m.mtp}")
each_name = pytest.mark.parametrize("name", [QWEN3_5, NEXT])
GROUPS_OF_64 = Scheme(group_size=64)


@cache
def index_of(moe: Moe) -> CheckpointIndex:
    return index_with(moe_tensors(moe))


def index_with(tensors: Mapping[str, torch.Tensor]) -> CheckpointIndex:
    """Headers of tensors of which none is on a disk."""
    file = Path("/nowhere/model.safetensors")
    infos = {
        name: TensorInfo(name, "BF16", tuple(tensor.shape), file, 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return CheckpointIndex(folder=file.parent, tensors=infos)


def arch_of(moe: Moe) -> Architecture:
    return architecture_in(moe_config(moe), index_of(moe))


def plan_of(moe: Moe, *overrides: Override, **scheme: Any) -> TensorPlan:
    chosen = Scheme(group_size=64, overrides=overrides, **scheme)
    return plan_tensors(arch_of(moe), index_of(moe), chosen)


def quantized_modules(moe: Moe) -> set[str]:
    """As this project promises them, spelled out."""
    names = set()
    is_next = moe.name == NEXT
    for block in range(BLOCKS):
        inputs = ["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"]
        linear = ["linear_attn.in_proj_qkvz"] if is_next else inputs
        full = [f"self_attn.{x}_proj" for x in "qkvo"]
        names |= {(block, n) for n in (full if block == 3 else [*linear, "linear_attn.out_proj"])}
        is_dense = block not in moe.moe_blocks
        owners = ["mlp"] if is_dense else [f"mlp.experts.{e}" for e in range(EXPERTS)]
        owners += [] if is_dense else ["mlp.shared_expert"]
        names |= {(block, f"{o}.{x}_proj") for o in owners for x in ("gate", "up", "down")}
    return {f"{moe.prefix}layers.{block}.{name}" for block, name in names}


@each_form
def test_every_tensor_has_one_fate(moe: Moe) -> None:
    plan = plan_of(moe)
    assert set(plan.fates) == set(moe_tensors(moe))
    assert set(plan.grids()) == quantized_modules(moe)
    held = {m for _, fate in plan.all_quantized() for m in fate.modules}
    assert held == quantized_modules(moe)
    mlp = f"{moe.prefix}layers.3.mlp"
    assert plan.fates[f"{mlp}.gate.weight"] == Keep("router", "small, chooses the experts")
    assert plan.fates[f"{mlp}.shared_expert_gate.weight"] == Keep("shared expert", "a vector")
    for name in moe_tensors(moe):
        if name.startswith("mtp."):
            assert plan.fates[name] == Keep("mtp", "drafts must match")


@each_form
def test_experts_of_a_block_are_quantized_as_they_are_stored(moe: Moe) -> None:
    fates = plan_of(moe).fates
    owner = f"{moe.prefix}layers.2.mlp.experts"
    if moe.form == "one by one":
        fate = fates[f"{owner}.3.up_proj.weight"]
        assert isinstance(fate, Quantize)
        assert fate.modules == (f"{owner}.3.up_proj",)
        return
    gate_up, down = fates[f"{owner}.gate_up_proj"], fates[f"{owner}.down_proj"]
    assert isinstance(gate_up, Quantize)
    assert isinstance(down, Quantize)
    parts = [f"{owner}.{e}.{x}_proj" for e in range(EXPERTS) for x in ("gate", "up")]
    assert gate_up.modules == tuple(parts)
    assert down.modules == tuple(f"{owner}.{e}.down_proj" for e in range(EXPERTS))
    info = index_of(moe).tensors[f"{owner}.gate_up_proj"]
    assert gate_up.module_shape(info) == (INNER, HIDDEN)


@each_form
def test_expected_shapes_are_those_of_the_model(moe: Moe) -> None:
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model_tensors(moe).items()
        if not name.startswith("model.visual.")
    }
    assert expected_shapes(arch_of(moe)) == shapes


@each_name
def test_groups_stand_in_the_order_of_execution(name: str) -> None:
    moe = Moe(name)
    groups = [g for g in linear_groups(arch_of(moe), plan_of(moe).sources) if g.block == 2]
    shared = "mlp.shared_expert."
    words = ["linear_attn.in_proj", "linear_attn.out_proj", f"{shared}gate", f"{shared}down"]
    for group, word in zip(groups, [*words, "mlp.experts.gate_up"], strict=True):
        assert group.parameters[0].startswith(f"{moe.prefix}layers.2.{word}")
    assert groups[-1].inputs == tuple((parameter,) for parameter in groups[-1].parameters)


# --- MTP heads in config.json and in files --------------------------------------------------------


def test_a_silent_config_has_the_head_that_is_stored() -> None:
    assert "num_nextn_predict_layers" not in moe_config(Moe(NEXT))
    assert arch_of(Moe(NEXT, mtp="stacks")).mtp is not None
    assert arch_of(Moe(NEXT, mtp=None)).mtp is None


def test_a_head_of_which_a_part_is_stored_is_missed() -> None:
    moe = Moe(NEXT)
    tensors = moe_tensors(moe)
    rest = {n: t for n, t in tensors.items() if not n.startswith("mtp.") or n == "mtp.fc.weight"}
    arch = architecture_in(moe_config(moe), index_with(rest))
    with pytest.raises(PlanError, match=r"lacks mtp\.") as caught:
        plan_tensors(arch, index_with(rest), GROUPS_OF_64)
    assert len(str(caught.value)) < 400


def test_a_declared_head_that_is_not_stored_is_missed() -> None:
    moe = Moe(NEXT, mtp=None, values=(("num_nextn_predict_layers", 1),))
    with pytest.raises(PlanError, match=r"lacks mtp\."):
        plan_of(moe)


@pytest.mark.parametrize(
    ("name", "key"), [(QWEN3_5, "mtp_num_hidden_layers"), (NEXT, "num_nextn_predict_layers")]
)
def test_a_head_of_two_layers_is_not_supported(name: str, key: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=f"{key} 2: heads of one layer"):
        architecture_of(moe_config(Moe(name, values=((key, 2),))))


@each_name
def test_a_mixture_in_the_mtp_layer_is_not_quantized(name: str) -> None:
    with pytest.raises(RecipeError, match=r"mtp_bits .* mixture of experts.* leave it out"):
        plan_of(Moe(name), mtp_bits=8)


def test_a_dense_mtp_layer_may_be_quantized() -> None:
    # vLLM builds it as config.json says of block 0.
    moe = Moe(NEXT, mtp=None, values=(("mlp_only_layers", [0]),))
    arch = architecture_of(moe_config(moe))
    assert arch.mtp is not None
    assert arch.mtp.shapes["mtp.layers.0.mlp.down_proj.weight"] == (HIDDEN, 256)
    assert [g.members[0] for g in arch.mtp.input_groups][-1] == "mlp.down_proj"


# --- recipes --------------------------------------------------------------------------------------


def test_kept_stacks_are_stored_one_by_one_unless_that_is_not_wanted() -> None:
    moe = Moe(QWEN3_5)
    plan = plan_of(moe, Override(match=r"layers\.1\.mlp\.experts\.", keep=True))
    owner = f"{moe.prefix}layers.1.mlp.experts"
    down = tuple(f"{owner}.{e}.down_proj" for e in range(EXPERTS))
    assert plan.fates[f"{owner}.down_proj"] == Keep("experts", "as the recipe says", down)
    whole = plan.keeping_stacks()
    assert whole.fates[f"{owner}.down_proj"] == Keep("experts", "as the recipe says")
    assert whole.grids() == plan.grids()
    assert not any(n.startswith(owner) for n in plan.grids())
    assert any(n.startswith(f"{moe.prefix}layers.2.mlp.experts") for n in plan.grids())


def test_experts_that_are_stored_one_by_one_are_kept_as_they_are() -> None:
    moe = Moe(NEXT, form="one by one")
    fates = plan_of(moe, Override(match=r"mlp\.experts", keep=True)).fates
    name = f"{moe.prefix}layers.3.mlp.experts.0.up_proj.weight"
    assert fates[name] == Keep("experts", "as the recipe says")
    dense = fates[f"{moe.prefix}layers.{DENSE_BLOCK}.mlp.up_proj.weight"]
    assert isinstance(dense, Quantize)


def test_experts_may_have_a_grid_of_their_own() -> None:
    for moe in (Moe(QWEN3_5), Moe(NEXT, form="one by one")):
        grids = plan_of(moe, Override(match=r"mlp\.experts", bits=8, group_size=32)).grids()
        for module, grid in grids.items():
            expected = (8, 32) if ".experts." in module else (4, 64)
            assert (grid.bits, grid.group_size) == expected, module


@pytest.mark.parametrize(
    "match", [r"experts\.0\.", r"experts\.\d+\.down_proj", r"experts\.[02]\.gate_proj"]
)
@pytest.mark.parametrize("moe", [Moe(QWEN3_5), Moe(NEXT, form="one by one")])
@pytest.mark.parametrize("what", [{"keep": True}, {"bits": 8}])
def test_a_rule_that_parts_the_experts_of_a_block_is_refused(
    moe: Moe, match: str, what: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=r"engines fuse the two into one module"):
        plan_of(moe, Override(match=match, **what))


@each_name
def test_a_rule_that_parts_the_shared_expert_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"shared_expert\.up_proj but not"):
        plan_of(Moe(name), Override(match=r"shared_expert\.up_proj", keep=True))


@each_name
@pytest.mark.parametrize("match", [r"mlp\.gate$", "shared_expert_gate", "in_proj_ba", "mtp"])
def test_a_rule_for_what_is_never_quantized_is_refused(name: str, match: str) -> None:
    with pytest.raises(RecipeError, match="decides for no Linear"):
        plan_of(Moe(name), Override(match=match, bits=8))


def test_inputs_that_no_group_divides_are_refused() -> None:
    with pytest.raises(PlanError, match=r"experts\.0\.down_proj has 128 x 64 weights"):
        plan_tensors(arch_of(FORMS[0]), index_of(FORMS[0]), Scheme(group_size=128))


# --- broken checkpoints ---------------------------------------------------------------------------


@each_name
def test_a_missing_expert_is_named(name: str) -> None:
    moe = Moe(name, form="one by one")
    tensors = moe_tensors(moe)
    lost = f"{moe.prefix}layers.2.mlp.experts.1.up_proj.weight"
    del tensors[lost]
    with pytest.raises(PlanError) as caught:
        plan_tensors(arch_of(moe), index_with(tensors), GROUPS_OF_64)
    assert f"lacks {lost}, which" in str(caught.value)


@each_name
def test_a_missing_stack_is_named(name: str) -> None:
    moe = Moe(name, form="stacks")
    tensors = moe_tensors(moe)
    lost = f"{moe.prefix}layers.2.mlp.experts.gate_up_proj"
    del tensors[lost]
    with pytest.raises(PlanError) as caught:
        plan_tensors(arch_of(moe), index_with(tensors), GROUPS_OF_64)
    assert f"lacks {lost}, which" in str(caught.value)


@pytest.mark.parametrize("form", ["stacks", "one by one"])
def test_an_expert_too_many_is_refused(form: Any) -> None:
    moe = Moe(QWEN3_5, form=form)
    arch = architecture_of(moe_config(Moe(QWEN3_5, values=(("num_experts", EXPERTS - 1),))))
    with pytest.raises(PlanError, match=r"has shape|has no single fate"):
        plan_tensors(arch, index_of(moe), GROUPS_OF_64)


@each_name
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", -1),
        ("num_experts", "4"),
        ("moe_intermediate_size", 0),
        ("num_hidden_layers", 0),
        ("hidden_size", "128"),
        ("layer_types", ["linear_attention"]),
    ],
)
def test_a_broken_value_makes_one_line(name: str, key: str, value: object) -> None:
    moe = Moe(name, values=((key, value),))
    with pytest.raises(NybbleError) as caught:
        plan_tensors(architecture_of(moe_config(moe)), index_of(Moe(name)), GROUPS_OF_64)
    assert isinstance(caught.value, CheckpointError | PlanError)
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)
