"""What GPTQ's declaration makes each engine build."""

from __future__ import annotations

from typing import Any

import pytest
from support.declarations import (
    IN_BLOCK,
    NEWEST,
    PORTABLE,
    SGLANG,
    TRANSFORMERS,
    TRUNK,
    VLLM,
    builds,
    context,
    gptq,
    summary,
    trunk_linears,
    wrapper_layout,
)

from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage
from nybble.doctor.resolve.gptq import GPTQ

OLDEST, HOOKED = VLLM[0, 19], VLLM[0, 28]
LAYER = "language_model.model.layers.3"


@pytest.mark.parametrize(
    ("block", "layers"),
    [
        (gptq(), "bf16"),
        (gptq(modules_in_block_to_quantize=IN_BLOCK), "Q"),
        (gptq(modules_in_block_to_quantize=IN_BLOCK, dynamic={"-:.*mtp.*": {}}), "bf16"),
        (gptq(modules_in_block_to_quantize=IN_BLOCK, dynamic=PORTABLE), "bf16"),
    ],
)
@pytest.mark.parametrize("engine", VLLM.values(), ids=lambda engine: engine.id)
def test_the_parts_that_vllm_quantizes(engine: Engine, block: dict[str, Any], layers: str) -> None:
    packed = trunk_linears(wrapper_layout())
    assert summary(GPTQ, context(block, engine, packed)) == {
        "trunk": "Q",
        "ba": "bf16",
        "vision": "bf16",
        "mtp.fc": "bf16",
        "mtp.layers": layers,
        "head": "bf16",
    }


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_the_portable_rules_hold_everywhere(engine: Engine) -> None:
    block = gptq(modules_in_block_to_quantize=IN_BLOCK, dynamic=PORTABLE)
    parts = summary(GPTQ, context(block, engine))
    assert parts.pop("trunk") == "Q"
    assert set(parts.values()) == {"bf16"}


def test_sglang_and_transformers_read_half_of_it() -> None:
    listed = gptq(modules_in_block_to_quantize=IN_BLOCK)
    assert summary(GPTQ, context(listed, SGLANG))["mtp.layers"] == "Q"
    assert summary(GPTQ, context(listed, SGLANG))["ba"] == "Q"
    ruled = gptq(dynamic=PORTABLE)
    assert summary(GPTQ, context(ruled, TRANSFORMERS))["ba"] == "Q"
    assert summary(GPTQ, context(ruled, SGLANG))["ba"] == "bf16"


def test_rules_see_fused_names_only() -> None:
    block = gptq(dynamic={r"-:.*self_attn\.q_proj": {}, "-:.*gate_up_proj": {}})
    found = builds(GPTQ, context(block, packed=trunk_linears(wrapper_layout())))
    assert found[f"{LAYER}.self_attn.qkv_proj"] != DENSE
    assert found[f"{LAYER}.mlp.gate_up_proj"] == DENSE


def test_rules_match_at_the_start_and_change_what_they_name() -> None:
    rules = {"down_proj": {"bits": 8}, r"+:.*\.o_proj": {"bits": 8, "group_size": -1}}
    found = builds(GPTQ, context(gptq(modules_in_block_to_quantize=["_proj"], dynamic=rules)))
    assert found[f"{LAYER}.mlp.down_proj"] == Scheme(Storage.GPTQ, 4, 128, True)
    assert found[f"{LAYER}.self_attn.o_proj"] == Scheme(Storage.GPTQ, 8, -1, True)


def test_parts_of_one_module_that_differ_are_refused() -> None:
    block = gptq(modules_in_block_to_quantize=["self_attn.q_proj"])
    refused = builds(GPTQ, context(block))[f"{LAYER}.self_attn.qkv_proj"]
    assert isinstance(refused, Refusal)
    assert refused.exception == "ValueError"
    assert "some but not all" in refused.message


def test_an_entry_is_a_substring_in_vllm_and_an_end_in_transformers() -> None:
    block = gptq(modules_in_block_to_quantize=[["mlp"]])
    assert builds(GPTQ, context(block))[f"{LAYER}.mlp.down_proj"] != DENSE
    assert builds(GPTQ, context(block, TRANSFORMERS))[f"{TRUNK}.3.mlp.down_proj"] == DENSE


def test_the_hook_keeps_mtp_layers_dense_since_028() -> None:
    """By any rule that says mtp, even one that matches nothing; fc is asked as ever."""
    rules = {"-:mtp-is-not-here": {}}
    block = gptq(modules_in_block_to_quantize=["mtp", "_proj"], dynamic=rules)
    parts = {engine: summary(GPTQ, context(block, engine)) for engine in (OLDEST, HOOKED)}
    assert [parts[engine]["mtp.layers"] for engine in parts] == ["Q", "bf16"]
    assert [parts[engine]["mtp.fc"] for engine in parts] == ["Q", "Q"]


def test_a_headerless_list_quantizes_all_since_030() -> None:
    old = summary(GPTQ, context(gptq(), HOOKED))
    new = summary(GPTQ, context(gptq(), NEWEST))
    assert (old["trunk"], new["trunk"]) == ("bf16", "Q")


@pytest.mark.parametrize(
    ("block", "refused"),
    [
        (gptq(desc_act=True), "None None ValueError None None"),
        (gptq(desc_act=True, group_size=-1), "None None None None None"),
        (gptq(dynamic={".*": {"desc_act": True}}), "None None ValueError None None"),
        (gptq(dynamic={"-:.*": {"desc_act": True}}), "None None None None None"),
        (gptq(desc_act=None), "ValueError ValueError ValueError None ValueError"),
        (gptq(sym=None), "None ValueError ValueError None ValueError"),
        (gptq(bits=None), "ValueError ValueError ValueError TypeError ValueError"),
        (gptq(bits=3), "None ValueError ValueError None ValueError"),
        (
            gptq(bits=0),
            "ZeroDivisionError ZeroDivisionError ZeroDivisionError ValueError ValueError",
        ),
        (gptq(sym=False), "None ValueError ValueError None ValueError"),
        (gptq(group_size=0), "None None None ValueError ValueError"),
        (gptq(dynamic=[1]), "None None AttributeError None None"),
        (
            gptq(modules_in_block_to_quantize=["mlp"]),
            "None None None TypeError None",
        ),
        (gptq(modules_in_block_to_quantize=3), "TypeError TypeError TypeError TypeError None"),
        (gptq(quant_method="auto_gptq"), "ValueError None None None ValueError"),
    ],
)
def test_declarations_that_are_refused(block: dict[str, Any], refused: str) -> None:
    engines = (OLDEST, HOOKED, NEWEST, TRANSFORMERS, SGLANG)
    found = [GPTQ.refusal(context(block, engine)) for engine in engines]
    assert [str(one and one.exception) for one in found] == refused.split()


def test_a_group_that_no_kernel_takes_is_refused_per_module() -> None:
    block = gptq(group_size=48, modules_in_block_to_quantize=["mlp.down_proj"])
    assert GPTQ.refusal(context(block)) is None
    found = builds(GPTQ, context(block))
    assert isinstance(found[f"{LAYER}.mlp.down_proj"], Refusal)
    assert found[f"{LAYER}.self_attn.o_proj"] == DENSE


def test_float16_kernels_are_not_analysed() -> None:
    found = builds(GPTQ, context(gptq(sym=False), OLDEST))
    assert {type(one) for one in found.values()} >= {NotAnalysed}
