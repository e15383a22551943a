"""fp8, ModelOpt and bitsandbytes: what vLLM builds, and where nothing is predicted."""

from __future__ import annotations

from typing import Any

import pytest
from support.ct_blocks import (
    NEWEST,
    OLDEST,
    SGLANG,
    TRANSFORMERS,
    VLLM,
    Block,
    built,
    context,
    module,
    modules,
)
from support.ct_cases import OTHERS

from nybble.doctor.engines import ENGINES
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal, Scheme, Storage
from nybble.doctor.resolve.methods import method_of

FP8, FP4 = Scheme(Storage.FP8, 8), Scheme(Storage.FP4, 4)
BNB: Block = {"quant_method": "bitsandbytes", "load_in_4bit": True}
NVFP4: Block = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}


def dense_in(declared: Block, engine: Any = NEWEST) -> set[str]:
    """Names of the modules that are built dense; all others are built as one and the same."""
    found = built(declared, engine)
    assert len({one for one in found.values() if one != DENSE}) == 1
    return {name for name, one in found.items() if one == DENSE}


@pytest.mark.parametrize("engine", VLLM, ids=lambda engine: engine.id)
def test_fp8_goes_by_whole_names(engine: Any) -> None:
    expected = {"head", "mtp fc", "tower qkv", "qkv", "experts"}
    assert dense_in(OTHERS["fp8 of blocks"], engine) == expected
    assert dense_in(OTHERS["fp8"], engine) == {"head"}
    apart = built(OTHERS["fp8 of some parts"], engine)
    assert isinstance(apart["qkv"], Refusal)
    assert apart["mtp fc"] == FP8  # "mtp" is no module's name


def test_fp8_heeds_the_fused_name_since_0_24() -> None:
    name = "model.language_model.layers.3.self_attn.qkv_proj"
    declared = OTHERS["fp8"] | {"ignored_layers": [name]}
    found = [built(declared, engine)["qkv"] for engine in VLLM]
    assert found == [FP8, DENSE, DENSE, DENSE, DENSE]


@pytest.mark.parametrize(
    ("case", "exception"),
    [
        ("fp8, nothing said", "ValueError"),
        ("fp8, unknown scheme", "ValueError"),
        ("fp8, odd blocks", "ValueError"),
        ("fp8, blocks of no list", "TypeError"),
        ("modelopt, unknown", "ValueError"),
        ("modelopt, nothing said", "ValueError"),
        ("modelopt, no list", "ValueError"),
        ("modelopt, nested", "ValueError"),
    ],
)
def test_declarations_that_are_refused(case: str, exception: str) -> None:
    method = method_of(OTHERS[case])
    assert method is not None
    refusal = method.refusal(context(OTHERS[case]))
    assert refusal is not None
    assert refusal.exception == exception
    assert NEWEST.label in refusal.evidence


def test_modelopt_excludes_by_wildcards_and_parts_of_names() -> None:
    found = dense_in(OTHERS["modelopt FP8"])
    assert found == {"head", "tower qkv", "tower fc", "mtp fc", "mtp qkv", "mtp down", "ba"}
    assert dense_in(OTHERS["modelopt FP8"] | {"ignore": ["visual"]}) == {"tower qkv", "tower fc"}


def test_the_mtp_heads_first_linear_is_dense_with_fp4() -> None:
    for engine in VLLM:
        found = built(NVFP4, engine)
        assert found["mtp down"] == FP4
        if engine is OLDEST:
            assert isinstance(found["mtp fc"], NotAnalysed)
        else:
            assert found["mtp fc"] == DENSE
    assert built(NVFP4 | {"quant_algo": "FP8"})["mtp fc"] == FP8
    method = method_of(NVFP4)
    assert method is not None
    fc = module("mtp.fc")
    found = [method.resolve(context(NVFP4, one, "Qwen3NextForCausalLM"), fc) for one in VLLM]
    assert found[1] == FP4
    assert found[3:] == [DENSE, DENSE]


def test_modelopts_nested_form() -> None:
    inner = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
    declared = {
        "quant_method": "modelopt",
        "quantization": inner | {"exclude_modules": ["lm_head", "mtp*"]},
    }
    assert dense_in(declared) == {"head", "mtp fc", "mtp qkv", "mtp down"}


def test_modelopt_as_far_as_it_is_known() -> None:
    for algorithm in ("MIXED_PRECISION", "mixed_precision"):
        assert isinstance(built(NVFP4 | {"quant_algo": algorithm})["o"], NotAnalysed)
    assert isinstance(built(NVFP4 | {"quant_algo": "FP8_PB_WO"})["experts"], NotAnalysed)
    long = NVFP4 | {"ignore": ["*a" * 200]}
    assert isinstance(built(long)["o"], NotAnalysed)


def test_bitsandbytes() -> None:
    skipping = BNB | {"llm_int8_skip_modules": ["mtp", "visual.blocks.0", "language_model"]}
    for engine in VLLM[:2]:
        assert dense_in(BNB, engine) == {"head"}
        assert "mtp qkv" in dense_in(BNB | {"llm_int8_skip_modules": ["mtp"]}, engine)
        found = built(skipping, engine)
        quantized = {name for name, one in found.items() if one == Scheme(Storage.BNB)}
        assert quantized == {"experts"}
    assert isinstance(built(BNB, VLLM[2])["o"], NotAnalysed)
    gone = built(BNB, NEWEST)["o"]
    assert isinstance(gone, Refusal)
    assert gone.exception == "ValueError"


@pytest.mark.parametrize("name", ["fp8", "modelopt", "bitsandbytes"])
def test_other_engines_are_not_analysed(name: str) -> None:
    declared = {"quant_method": name, "quant_algo": "FP8", "activation_scheme": "dynamic"}
    assert {type(one) for one in built(declared, SGLANG).values()} == {NotAnalysed}
    # It knows no ModelOpt, says so, and builds all dense.
    expected = DENSE if name == "modelopt" else None
    for one in built(declared, TRANSFORMERS).values():
        assert one == expected if expected else isinstance(one, NotAnalysed)


@pytest.mark.parametrize("value", [None, True, 3, "mtp", ["mtp", 3], {"a": 1}, [[]], ["*" * 400]])
@pytest.mark.parametrize(
    "key",
    [
        "activation_scheme",
        "weight_block_size",
        "ignored_layers",
        "modules_to_not_convert",
        "quant_algo",
        "quantization",
        "ignore",
        "llm_int8_skip_modules",
        "bnb_4bit_quant_storage",
        "dynamic",
    ],
)
def test_any_value_is_answered(key: str, value: Any) -> None:
    for base in (OTHERS["fp8"], NVFP4, BNB):
        for engine in ENGINES:
            for one in built(base | {key: value}, engine, **modules()).values():
                assert isinstance(one, Scheme | Refusal | NotAnalysed)
