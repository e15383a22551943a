"""Which modules a compressed-tensors declaration quantizes, in each engine and release."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.ct_blocks import (
    INT4,
    INT8,
    NEWEST,
    OLDEST,
    PORTABLE,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    WITHOUT_MTP,
    Block,
    block,
    built,
    context,
    group,
    module,
    modules,
)
from support.ct_cases import ARGUMENTS, EXACT, SCHEMES, TENSOR8

from nybble.doctor.engines import ENGINES
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage
from nybble.doctor.resolve.methods import method_of

Q4 = Scheme(Storage.PACKED, 4, 128, True)
Q8 = Scheme(Storage.PACKED, 8, -1, True)
SINCE_24 = [engine for engine in VLLM if engine.first >= (0, 24)]
SINCE_30 = [engine for engine in VLLM if engine.first >= (0, 30)]
QKV = module("model.layers.3.self_attn.qkv_proj", "q_proj", "k_proj", "v_proj")
BOTH = r"re:.*layers\.\d+\.(self_attn|mlp)\."
ROWS: dict[str, tuple[Block, tuple[bool, bool, bool, bool]]] = {
    "Linear, ignore without mtp": (block(ignore=WITHOUT_MTP), (True, False, True, True)),
    "ignore .*mtp.*": (block(), (True, False, False, False)),
    "ignore ^mtp.*": (block(ignore=(*WITHOUT_MTP, "re:^mtp.*")), (True, False, False, False)),
    "ignore exact names": (block(ignore=(*WITHOUT_MTP, *EXACT)), (True, False, False, False)),
    "attention and MLP": (block(group(None, BOTH)), (True, False, False, False)),
    "layers of MTP too": (
        block(group(None, BOTH), ignore=WITHOUT_MTP),
        (True, False, False, True),
    ),
    "language_model": (
        block(group(None, "re:.*language_model.*"), ignore=()),
        (True, False, False, False),
    ),
}
"""Whether the trunk, the tower, mtp.fc and mtp.layers are quantized: as vLLM 0.32 was seen to."""


@pytest.mark.parametrize("engine", SINCE_24, ids=lambda engine: engine.id)
@pytest.mark.parametrize("row", ROWS)
def test_the_parts_that_are_quantized(row: str, engine: Any) -> None:
    declared, expected = ROWS[row]
    found = built(declared, engine)
    parts = (("qkv", "down"), ("tower qkv", "tower fc"), ("mtp fc",), ("mtp qkv", "mtp down"))
    for names, is_quantized in zip(parts, expected, strict=True):
        assert [found[name] for name in names] == [Q4 if is_quantized else DENSE] * len(names)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_the_portable_set_means_the_same_everywhere(engine: Any) -> None:
    named = {} if engine in VLLM else modules("model.language_model", "model.visual")
    found = built(block(), engine, **named)
    experts = DENSE if engine is TRANSFORMERS else Q4  # no Linear there
    assert found.pop("experts") == experts
    quantized = {"qkv", "o", "gate_up", "down", "qkvz"}
    assert found == {name: Q4 if name in quantized else DENSE for name in found}


def test_what_matches_no_target() -> None:
    declared = block(group(None, "re:.*o_proj"), ignore=())
    assert {type(built(declared, engine)["down"]) for engine in SINCE_24} == {Scheme}
    refused = built(declared, SGLANG)["down"]
    assert isinstance(refused, Refusal)
    assert refused.exception == "ValueError"
    assert isinstance(built(declared, OLDEST)["down"], NotAnalysed)  # its releases differ
    assert built(declared, OLDEST)["head"] == DENSE
    assert built(declared, TRANSFORMERS)["down"] == DENSE


def test_a_bare_prefix_ignores_nothing() -> None:
    found = built(block(ignore=("mtp", "model.visual", "model.language_model")))
    assert {name for name, scheme in found.items() if scheme == DENSE} == {"head"}


def test_an_escaped_prefix_is_not_renamed() -> None:
    rule = r"re:model\.language_model\."
    assert built(block(ignore=(rule,)))["o"] == Q4
    assert built(block(ignore=(rule,)), TRANSFORMERS, o=module("model.language_model.o"))["o"] == (
        DENSE
    )


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.id)
def test_parts_that_are_ignored_apart(engine: Any) -> None:
    found = built(block(ignore=("re:.*q_proj",)), engine, x=QKV)["x"]
    if engine is TRANSFORMERS:  # it fuses nothing
        assert found == Q4
    else:
        assert isinstance(found, Refusal)
        assert found.exception == "ValueError"
        assert engine.label in found.evidence


def test_a_pattern_of_the_fused_name_counts_since_0_30() -> None:
    for engine in (*VLLM, SGLANG):
        found = built(block(ignore=("re:.*qkv_proj",)), engine, x=QKV)["x"]
        assert found == (DENSE if engine in SINCE_30 else Q4)
        exact = built(block(ignore=(QKV.name,)), engine, x=QKV)["x"]
        assert exact == DENSE


def test_parts_come_before_the_class_since_0_28() -> None:
    parts = [f"model.layers.3.self_attn.{one}_proj" for one in "qkv"]
    declared = block(group(INT8, *parts), group(INT4), ignore=())
    for engine in (*VLLM, SGLANG):
        assert built(declared, engine, x=QKV)["x"] == (Q8 if engine.is_vllm(since=(0, 28)) else Q4)


def test_sglang_knows_no_parts_of_models_without_a_mapping() -> None:
    declared = block(ignore=tuple(f"model.layers.3.self_attn.{one}_proj" for one in "qkv"))
    method = method_of(declared)
    assert method is not None
    for name, expected in (("LlamaForCausalLM", Q4), ("Gemma3ForCausalLM", DENSE)):
        assert method.resolve(context(declared, SGLANG, name), QKV) == expected
        assert method.resolve(context(declared, NEWEST, name), QKV) == DENSE


def test_sglang_ignores_by_the_end_of_a_name() -> None:
    declared = block(ignore=("self_attn.o_proj",))
    name = module("model.layers.3.self_attn.o_proj")
    assert built(declared, SGLANG, x=name)["x"] == DENSE
    assert built(declared, NEWEST, x=name)["x"] == Q4
    assert built(block(ignore=("attn.o_proj",)), SGLANG, x=name)["x"] == Q4


def test_the_output_head() -> None:
    by_name = block(group(None, "re:.*lm_head"), ignore=())
    assert {built(by_name, engine)["head"] for engine in SINCE_24} == {Q4}
    assert isinstance(built(by_name, OLDEST)["head"], NotAnalysed)
    assert built(by_name, SGLANG)["head"] == Q4
    assert built(block(group(None, "lm_head"), ignore=()), SGLANG)["head"] == Q4
    assert built(block(ignore=()), NEWEST)["head"] == DENSE  # ParallelLMHead is no Linear
    assert built(block(ignore=()), TRANSFORMERS)["head"] == Q4  # here it is
    blocks = INT8 | {"type": "float", "strategy": "block", "block_structure": [128, 128]}
    refused = built(block(group(blocks, "re:.*lm_head"), ignore=()), SGLANG)["head"]
    assert isinstance(refused, Refusal)
    assert refused.exception == "NotImplementedError"


def test_experts_go_by_the_names_of_the_first() -> None:
    first = "model.language_model.layers.3.mlp.experts.0"
    ignored = tuple(f"{first}.{one}_proj" for one in ("gate", "up", "down"))
    assert built(block(ignore=ignored))["experts"] == DENSE
    apart = built(block(ignore=ignored[:2]))["experts"]
    assert isinstance(apart, Refusal)
    assert apart.exception == "ValueError"
    asymmetric = block(group(INT4 | {"symmetric": False}))
    assert built(asymmetric)["experts"] == replace(Q4, symmetric=False)
    assert isinstance(built(asymmetric, SGLANG)["experts"], NotAnalysed)


def test_transformers_needs_the_status() -> None:
    named = {"o": module("model.language_model.layers.3.self_attn.o_proj")}
    declared = block()
    assert built(declared, TRANSFORMERS, **named)["o"] == Q4
    del declared["quantization_status"]
    assert built(declared, TRANSFORMERS, **named)["o"] == DENSE
    assert built(declared, NEWEST, **named)["o"] == Q4


def test_activation_order() -> None:
    for engine in ENGINES:
        found = built(ARGUMENTS["{'actorder': 'group'}"], engine)["o"]
        is_refused = engine in (*SINCE_30, TRANSFORMERS)
        assert isinstance(found, Refusal) is is_refused
        assert built(ARGUMENTS["{'actorder': 'static'}"], engine)["o"] == Q4
    rows = ARGUMENTS["{'actorder': 'weight', 'strategy': 'channel', 'group_size': None}"]
    assert isinstance(built(rows, OLDEST)["o"], Refusal)  # compressed-tensors 0.15
    assert {built(rows, engine)["o"] for engine in SINCE_24} == {replace(Q4, group_size=-1)}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("W8A8", Scheme(Storage.INT8, 8)),
        ("W8A16 as integers", "AssertionError"),
        ("FP8", Scheme(Storage.FP8, 8)),
        ("FP8 weights", Scheme(Storage.FP8, 8)),
        ("FP8 by groups", Scheme(Storage.FP8, 8)),
        ("FP8 as dense", "NotImplementedError"),
        ("NVFP4", Scheme(Storage.FP4, 4)),
        ("MXFP4", Scheme(Storage.FP4, 4)),
        ("no format", "NotImplementedError"),
        ("format of the group", Q4),
        ("1 bit", "ValueError"),
        ("asymmetric", replace(Q4, symmetric=False)),
    ],
)
def test_what_vllm_0_32_serves(case: str, expected: Scheme | str) -> None:
    found = built(SCHEMES[case])["o"]
    assert (found.exception if isinstance(found, Refusal) else found) == expected


def test_three_bits_by_release() -> None:
    found = [built(SCHEMES["3 bits"], engine)["o"] for engine in ENGINES]
    assert [one.exception if isinstance(one, Refusal) else one for one in found] == [
        "NotImplementedError",
        "ValueError",
        "ValueError",
        replace(Q4, bits=3),
        replace(Q4, bits=3),
        replace(Q4, bits=3),
        "ImportError",
    ]


def test_what_depends_on_the_gpu_is_not_analysed() -> None:
    tokens = TENSOR8 | {"type": "float", "strategy": "token", "dynamic": True}
    found = built(block(group(INT4, input_activations=tokens)))["o"]
    assert isinstance(found, NotAnalysed)
    assert "GPU" in found.why


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}, None),
        ({"type": "int", "num_bits": 8, "strategy": "tensor"}, "NotImplementedError"),
        ({"type": "float", "num_bits": 8, "strategy": "group"}, "NotImplementedError"),
        ({"type": "float", "num_bits": 8, "strategy": "none"}, "ValueError"),
        ({"type": "float", "num_bits": 8, "strategy": "tensor"}, "NotImplementedError"),
        ([8], "AttributeError"),
    ],
)
def test_cache_schemes(cache: Any, expected: str | None) -> None:
    declared = block() | {"kv_cache_scheme": cache}
    method = method_of(declared)
    assert method is not None
    refusal = method.refusal(context(declared))
    assert (refusal and refusal.exception) == expected
    assert method.refusal(context(declared, SGLANG)) is None


@pytest.mark.parametrize(
    "more",
    [{"transform_config": {"config_groups": {}}}, {"linear_fp8_config": {}}],
)
def test_what_is_not_analysed(more: Block) -> None:
    assert isinstance(built(block() | more, SGLANG)["o"], NotAnalysed)


def test_a_pattern_that_never_ends() -> None:
    declared = block(ignore=(r"re:(.|..|...)*\s",))
    found = built(declared)["o"]
    assert isinstance(found, NotAnalysed)
    bad = built(block(ignore=("re:[",)))["o"]
    assert isinstance(bad, Refusal)
    assert bad.exception == "re.error"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "re:", "Linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
PATHS = [
    (),
    ("config_groups",),
    ("config_groups", "group_0"),
    *(("config_groups", "group_0", key) for key in ("targets", "weights", "input_activations")),
    *(("config_groups", "group_0", "weights", key) for key in (*INT4, "actorder", "scale_dtype")),
]
KEYS = ["ignore", "format", "kv_cache_scheme", "sparsity_config", "transform_config"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from([*PATHS[1:], *((key,) for key in KEYS)]), value=JSON)
def test_any_value_anywhere_is_answered(path: tuple[str, ...], value: Any) -> None:
    declared = block(group(INT4, input_activations=None, format=None))
    place = declared
    for key in path[:-1]:
        place[key] = dict(place[key])
        place = place[key]
    place[path[-1]] = value
    for engine in ENGINES:
        assert all(
            isinstance(one, Scheme | Refusal | NotAnalysed)
            for one in built(declared, engine).values()
        )


def test_long_lists_are_looked_up_quickly() -> None:
    names = tuple(f"model.language_model.layers.{n}.mlp.down_proj" for n in range(20_000))
    declared = block(group(INT4, *names), ignore=(*names[:-1], *PORTABLE))
    method = method_of(declared)
    assert method is not None
    known = context(declared)
    start = perf_counter()
    for n in range(18_000, 20_000):
        found = method.resolve(known, module(f"language_model.model.layers.{n}.mlp.down_proj"))
        assert found == (Q4 if n == 19_999 else DENSE)
    assert perf_counter() - start < 3  # to compare with each in turn would take a minute
