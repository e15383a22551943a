from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

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
from nybble.arch.spec import Architecture, KeepRule
from nybble.checkpoint.dtypes import SAFETENSORS_DTYPES
from nybble.checkpoint.headers import TensorInfo
from nybble.checkpoint.index import CheckpointIndex
from nybble.core.errors import PlanError
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Scheme

GRID = IntGrid(bits=4, group_size=128, signed_scales=True)
SCHEME = Scheme()
FORMS = [Tiny(), Tiny(wrapper=False), Tiny(float32_a_log=True), Tiny(tied=True), Tiny(mtp=False)]
Change = Callable[[dict[str, TensorInfo]], object]


def index_of(tiny: Tiny, change: Change = lambda _infos: None) -> CheckpointIndex:
    """The index a folder with this checkpoint would have, without the folder."""
    file = Path("model.safetensors")
    infos, place = {}, 0
    for name, tensor in tiny_tensors(tiny).items():
        dtype, shape = SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape)
        infos[name] = TensorInfo(name, dtype, shape, file, place, place + tensor.nbytes)
        place += tensor.nbytes
    change(infos)
    return CheckpointIndex(Path("base"), infos)


def plan_of(
    tiny: Tiny = FORMS[0], change: Change = lambda _infos: None, scheme: Scheme = SCHEME
) -> TensorPlan:
    return plan_tensors(architecture_of(tiny_config(tiny)), index_of(tiny, change), scheme)


def refused(tiny: Tiny = FORMS[0], change: Change = lambda _: None, scheme: Scheme = SCHEME) -> str:
    with pytest.raises(PlanError) as caught:
        plan_of(tiny, change, scheme)
    message = str(caught.value)
    assert "\n" not in message
    return message


def altered(name: str, **values: object) -> Change:
    def change(infos: dict[str, TensorInfo]) -> None:
        infos[name] = dataclasses.replace(infos[name], **values)

    return change


def added(name: str, shape: tuple[int, ...] = (3,)) -> Change:
    def change(infos: dict[str, TensorInfo]) -> None:
        infos[name] = TensorInfo(name, "BF16", shape, Path("model.safetensors"), 0, 6)

    return change


@pytest.mark.parametrize("tiny", FORMS, ids=str)
def test_every_tensor_has_a_fate_in_the_checkpoints_order(tiny: Tiny) -> None:
    index, plan = index_of(tiny), plan_of(tiny)
    assert list(plan.fates) == list(index.tensors)
    quantized, kept = dict(plan.all_quantized()), dict(plan.kept())
    assert {**quantized, **kept} == dict(plan.fates)
    assert not set(quantized) & set(kept)


@pytest.mark.parametrize("tiny", FORMS, ids=str)
def test_exactly_the_big_linears_of_the_trunk_are_quantized(tiny: Tiny) -> None:
    quantized = dict(plan_of(tiny).all_quantized())
    assert set(quantized) == {f"{module}.weight" for module in quantized_modules(tiny.prefix)}
    assert {fate.modules for fate in quantized.values()} == {
        (module,) for module in quantized_modules(tiny.prefix)
    }
    assert {fate.grid for fate in quantized.values()} == {GRID}


def test_a_blocks_weights_are_found_by_its_number() -> None:
    plan = plan_of()
    by_block = [plan.quantized(number) for number in range(4)]
    assert [len(fates) for fates in by_block] == [6, 6, 6, 7]
    assert sum(len(fates) for fates in by_block) == len(list(plan.all_quantized()))
    for number, fates in enumerate(by_block):
        assert all(f".layers.{number}." in name for name in fates)
        assert {fate.block for fate in fates.values()} == {number}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.pos_embed.weight", "vision"),
        ("mtp.fc.weight", "mtp"),
        ("mtp.layers.0.self_attn.q_proj.weight", "mtp"),
        ("mtp.layers.0.mlp.down_proj.weight", "mtp"),
        (f"{WRAPPER_PREFIX}embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "lm_head"),
        (f"{WRAPPER_PREFIX}norm.weight", "norms"),
        (f"{WRAPPER_PREFIX}layers.0.input_layernorm.weight", "norms"),
        (f"{WRAPPER_PREFIX}layers.3.self_attn.q_norm.weight", "norms"),
        (f"{WRAPPER_PREFIX}layers.0.linear_attn.norm.weight", "norms"),
        (f"{WRAPPER_PREFIX}layers.1.linear_attn.in_proj_a.weight", "gdn"),
        (f"{WRAPPER_PREFIX}layers.1.linear_attn.in_proj_b.weight", "gdn"),
        (f"{WRAPPER_PREFIX}layers.1.linear_attn.conv1d.weight", "gdn"),
        (f"{WRAPPER_PREFIX}layers.2.linear_attn.A_log", "gdn"),
        (f"{WRAPPER_PREFIX}layers.2.linear_attn.dt_bias", "gdn"),
    ],
)
def test_the_rest_is_kept_and_belongs_to_a_part(name: str, part: str) -> None:
    fate = plan_of().fates[name]
    assert isinstance(fate, Keep)
    assert fate.part == part
    assert fate.reason


def test_quantized_weights_belong_to_a_part() -> None:
    parts = {fate.modules[0].split(".", 4)[4]: fate.part for _, fate in plan_of().all_quantized()}
    assert {parts[f"linear_attn.{n}"] for n in ("in_proj_qkv", "in_proj_z", "out_proj")} == {"gdn"}
    assert {parts[f"self_attn.{n}_proj"] for n in "qkvo"} == {"attention"}
    assert {parts[f"mlp.{n}_proj"] for n in ("gate", "up", "down")} == {"mlp"}


@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.0.mlp.router.weight",
        "model.language_model.layers.0.mlp.gate_proj.bias",
        "model.language_model.layers.4.mlp.gate_proj.weight",
        "model.language_model.layers.0.mlp.gate_proj.weight.extra",
        "model.layers.0.mlp.gate_proj.weight",
        "model.audio.proj.weight",
        "xmtp.fc.weight",
        "lm_head.bias",
    ],
)
def test_a_tensor_that_no_rule_knows_is_named(name: str) -> None:
    message = refused(change=added(name))
    assert message.startswith(name)
    assert "model.safetensors" in message
    assert "no rule knows it" in message


def test_a_name_with_a_line_break_still_makes_one_line() -> None:
    assert "no rule knows it" in refused(change=added("odd\nname"))


def test_a_tensor_that_two_rules_claim_is_refused() -> None:
    arch = architecture_of(tiny_config(Tiny()))
    rule = KeepRule(r".*\.layers\.0\.mlp\.up_proj\.weight", "mlp", "on trial")
    with pytest.raises(PlanError, match=r"layers\.0\.mlp\.up_proj\.weight .* 2 rules claim it"):
        plan_tensors(_with_rule(arch, rule), index_of(Tiny()), Scheme())


def _with_rule(arch: Architecture, rule: KeepRule) -> Architecture:
    return dataclasses.replace(arch, keep_rules=(*arch.keep_rules, rule))


@pytest.mark.parametrize("name", MTP_SHAPES)
@pytest.mark.parametrize("tiny", FORMS[:2], ids=["wrapper", "text"])
def test_each_missing_tensor_of_the_mtp_head_is_named(tiny: Tiny, name: str) -> None:
    message = refused(tiny, lambda infos: infos.pop(name))
    assert name in message
    assert "lacks" in message


def test_all_15_tensors_of_the_mtp_head_are_expected() -> None:
    arch = architecture_of(tiny_config(Tiny()))
    assert arch.mtp is not None
    assert arch.mtp.shapes == MTP_SHAPES
    assert len(MTP_SHAPES) == 15


def test_a_whole_missing_mtp_head_is_told_without_a_flood_of_names() -> None:
    def drop(infos: dict[str, TensorInfo]) -> None:
        for name in MTP_SHAPES:
            del infos[name]

    message = refused(change=drop)
    assert "mtp.fc.weight" in message
    assert "12 more" in message
    assert len(message) < 400


def test_an_mtp_head_that_the_config_does_not_declare_is_refused() -> None:
    arch = architecture_of(tiny_config(Tiny(mtp=False)))
    with pytest.raises(PlanError, match=r"mtp\.fc\.weight.*mtp_num_hidden_layers"):
        plan_tensors(arch, index_of(Tiny()), Scheme())


@pytest.mark.parametrize(
    "name",
    [
        f"{WRAPPER_PREFIX}layers.3.self_attn.k_proj.weight",
        f"{WRAPPER_PREFIX}layers.1.linear_attn.A_log",
        f"{WRAPPER_PREFIX}embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_of_the_trunk_is_named(name: str) -> None:
    assert name in refused(change=lambda infos: infos.pop(name))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{WRAPPER_PREFIX}layers.0.mlp.up_proj.weight", (128, 256)),
        (f"{WRAPPER_PREFIX}layers.0.linear_attn.conv1d.weight", (256, 4)),
        ("mtp.fc.weight", (256, 128)),
        ("lm_head.weight", (352, 128)),
    ],
)
def test_a_wrong_shape_is_told_with_both_shapes(name: str, shape: tuple[int, ...]) -> None:
    right = list(tiny_tensors(Tiny())[name].shape)
    message = refused(change=altered(name, shape=shape))
    assert message.startswith(name)
    assert str(list(shape)) in message
    assert str(right) in message


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3", "U8", "I8"])
def test_a_base_that_is_stored_quantized_is_refused(dtype: str) -> None:
    name = f"{WRAPPER_PREFIX}layers.0.mlp.up_proj.weight"
    message = refused(change=altered(name, dtype=dtype))
    assert name in message
    assert dtype in message


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_base_of_floating_point_weights_is_taken(dtype: str) -> None:
    name = f"{WRAPPER_PREFIX}layers.0.mlp.up_proj.weight"
    assert isinstance(plan_of(change=altered(name, dtype=dtype)).fates[name], Quantize)


@pytest.mark.parametrize("group_size", [96, 256])
def test_a_group_size_that_does_not_divide_the_inputs_is_refused(group_size: int) -> None:
    message = refused(scheme=Scheme(group_size=group_size))
    assert f"{WRAPPER_PREFIX}layers.0.linear_attn.in_proj_qkv has" in message
    assert f"({group_size})" in message


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_a_group_size_that_divides_the_inputs_is_taken(group_size: int) -> None:
    assert len(list(plan_of(scheme=Scheme(group_size=group_size)).all_quantized())) == 25


def test_outputs_that_do_not_fill_packed_words_are_refused() -> None:
    heads = Tiny(text=(("linear_num_value_heads", 6), ("linear_value_head_dim", 24)))
    message = refused(heads, scheme=Scheme(group_size=32))
    assert "layers.0.linear_attn" in message
    assert "272 x 128" in message


def test_a_tied_head_is_the_embedding() -> None:
    arch = architecture_of(tiny_config(Tiny(tied=True)))
    plan = plan_of(Tiny(tied=True))
    assert arch.lm_head == arch.embedding == f"{WRAPPER_PREFIX}embed_tokens.weight"
    assert "lm_head.weight" not in plan.fates
    assert isinstance(plan.fates[arch.embedding], Keep)


def test_an_untied_head_is_a_tensor_of_its_own() -> None:
    arch = architecture_of(tiny_config(Tiny()))
    assert arch.lm_head == "lm_head.weight"
    assert arch.embedding != arch.lm_head
