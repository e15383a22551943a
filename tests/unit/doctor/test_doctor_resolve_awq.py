"""What AWQ's declaration makes each engine build."""

from __future__ import annotations

from typing import Any

import pytest
from support.declarations import (
    NEWEST,
    SGLANG,
    TRANSFORMERS,
    TRUNK,
    VLLM,
    awq,
    builds,
    context,
    summary,
    trunk_linears,
    wrapper_layout,
)

from nybble.doctor.engines import Engine
from nybble.doctor.resolve.awq import AWQ
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage

INT4 = Scheme(Storage.AWQ, 4, 128, False)
OLDEST, MIDDLE = VLLM[0, 19], VLLM[0, 24]
KEPT = ["mtp", "visual", "in_proj_a", "in_proj_b", "lm_head"]
LAYER = "language_model.model.layers"


@pytest.mark.parametrize("engine", VLLM.values(), ids=lambda engine: engine.id)
def test_entries_are_substrings_in_vllm(engine: Engine) -> None:
    parts = summary(AWQ, context(awq(modules_to_not_convert=KEPT), engine))
    assert parts.pop("trunk") == "Q"
    assert set(parts.values()) == {"bf16"}


@pytest.mark.parametrize("engine", VLLM.values(), ids=lambda engine: engine.id)
def test_without_a_list_a_parent_of_bare_parameters_takes_its_linears(engine: Engine) -> None:
    """``linear_attn.A_log`` is dense, so that ``linear_attn`` is found in the names below it."""
    packed = trunk_linears(wrapper_layout())
    found = builds(AWQ, context(awq(), engine, packed))
    assert found[f"{LAYER}.0.linear_attn.out_proj"] == DENSE
    assert found[f"{LAYER}.0.mlp.down_proj"] == INT4
    assert found[f"{LAYER}.3.self_attn.qkv_proj"] == INT4
    assert found["mtp.fc"] == found["mtp.layers.0.mlp.down_proj"] == DENSE


def test_sglang_has_no_list_of_its_own_and_sees_fused_names() -> None:
    assert summary(AWQ, context(awq(), SGLANG))["mtp.layers"] == "Q"
    block = awq(modules_to_not_convert=["q_proj", "mlp.down_proj"])
    found = builds(AWQ, context(block, SGLANG))
    assert found[f"{TRUNK}.3.self_attn.qkv_proj"] == INT4
    assert found[f"{TRUNK}.3.mlp.down_proj"] == DENSE


def test_a_fused_name_counts_since_024() -> None:
    block = awq(modules_to_not_convert=["qkv_proj"])
    name = f"{LAYER}.3.self_attn.qkv_proj"
    by_release = [builds(AWQ, context(block, engine))[name] for engine in VLLM.values()]
    assert by_release == [INT4] + [DENSE] * 4


def test_parts_of_one_module_that_differ_are_refused() -> None:
    found = builds(AWQ, context(awq(modules_to_not_convert=["q_proj"])))
    refused = found[f"{LAYER}.3.self_attn.qkv_proj"]
    assert isinstance(refused, Refusal)
    assert refused.exception == "ValueError"


def test_transformers_wants_whole_names_ends_or_patterns() -> None:
    block = awq(modules_to_not_convert=["visual", "model.visual", "down_proj", r".*\.o_proj"])
    found = builds(AWQ, context(block, TRANSFORMERS))
    assert found["model.visual.blocks.0.attn.qkv"] == DENSE
    assert found[f"{TRUNK}.0.mlp.down_proj"] == found[f"{TRUNK}.3.self_attn.o_proj"] == DENSE
    assert found[f"{TRUNK}.0.mlp.up_proj"] == INT4
    bare = builds(AWQ, context(awq(modules_to_not_convert=["visual"]), TRANSFORMERS))
    assert bare["model.visual.blocks.0.attn.qkv"] == INT4
    assert bare["lm_head"] == DENSE


def test_the_old_names_of_the_keys_are_read() -> None:
    block = awq(bits=None, w_bit=4, group_size=None, q_group_size=64)
    found = builds(AWQ, context({**block, "modules_to_not_convert": ["mtp"]}, MIDDLE))
    assert found[f"{LAYER}.0.mlp.down_proj"] == Scheme(Storage.AWQ, 4, 64, False)


@pytest.mark.parametrize(
    ("block", "refused"),
    [
        (awq(zero_point=None), "ValueError ValueError None ValueError"),
        (awq(bits=8), "ValueError ValueError None ValueError"),
        (awq(bits="4"), "TypeError TypeError None TypeError"),
        (awq(version="gemx"), "None None ValueError None"),
        (awq(modules_to_not_convert=[1]), "AttributeError AttributeError None AttributeError"),
        (awq(modules_to_not_convert=5), "TypeError TypeError TypeError TypeError"),
        (awq(quant_method="auto_awq"), "ValueError None None ValueError"),
    ],
)
def test_declarations_that_are_refused(block: dict[str, Any], refused: str) -> None:
    engines = (OLDEST, NEWEST, TRANSFORMERS, SGLANG)
    found = [AWQ.refusal(context(block, engine)) for engine in engines]
    assert [str(one and one.exception) for one in found] == refused.split()


def test_float16_kernels_are_not_analysed() -> None:
    for engine in (OLDEST, SGLANG):
        found = builds(AWQ, context(awq(group_size=48), engine))
        assert {type(one) for one in found.values()} >= {NotAnalysed}
