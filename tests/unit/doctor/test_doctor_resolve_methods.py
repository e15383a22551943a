"""Which rules a declaration asks for, where it stands, and what becomes of unknown names."""

from __future__ import annotations

from typing import Any

import pytest
from support.ct_blocks import NEWEST, OLDEST, SGLANG, TRANSFORMERS, VLLM, built, context

from nybble.doctor.engines import ENGINES, Family
from nybble.doctor.resolve.built import DENSE, NotAnalysed, Refusal
from nybble.doctor.resolve.methods import declared_block, method_of


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("auto-round", "auto-round"),
        ("gptq", "gptq"),
        ("GPTQ", "gptq"),
        ("awq", "awq"),
        ("compressed-tensors", "compressed-tensors"),
        ("compressed_tensors", "compressed-tensors"),
        ("fp8", "fp8"),
        ("modelopt_fp4", "modelopt"),
        ("bitsandbytes", "bitsandbytes"),
        ("exl3", "exl3"),
    ],
)
def test_methods_by_name(name: str, method: str) -> None:
    found = method_of({"quant_method": name})
    assert found is not None
    assert found.name == method


def test_no_declaration_has_no_method() -> None:
    assert method_of(None) is None


@pytest.mark.parametrize("name", ["quark", "torchao", "mxfp4"])
def test_known_names_without_rules_are_not_analysed(name: str) -> None:
    for engine in (OLDEST, NEWEST, TRANSFORMERS):
        found = built({"quant_method": name}, engine)["o"]
        assert isinstance(found, NotAnalysed)
        assert name in found.why


def test_names_that_come_and_go() -> None:
    for name, known in (("gguf", VLLM[:1]), ("humming", VLLM[1:]), ("exl3", ())):
        for engine in VLLM:
            found = built({"quant_method": name}, engine)["o"]
            assert isinstance(found, NotAnalysed if engine in known else Refusal)


@pytest.mark.parametrize("name", ["exl3", "fbgemm_fp8"])
def test_names_that_are_refused(name: str) -> None:
    method = method_of({"quant_method": name})
    assert method is not None
    refusal = method.refusal(context({"quant_method": name}))
    assert refusal is not None
    assert refusal.exception == "ValueError"


def test_transformers_builds_all_dense_by_a_name_that_it_does_not_know() -> None:
    assert set(built({"quant_method": "exl3"}, TRANSFORMERS).values()) == {DENSE}
    assert isinstance(built({"quant_method": "exl3"}, SGLANG)["o"], Refusal)


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({}, {"vllm": "dense", "transformers": "ValueError", "sglang": "ValueError"}),
        ({"quant_method": ""}, {"vllm": "dense", "transformers": "dense", "sglang": "ValueError"}),
        (
            {"quant_method": None},
            {"vllm": "AttributeError", "transformers": "ValueError", "sglang": "AttributeError"},
        ),
        (
            {"quant_method": ["gptq"]},
            {"vllm": "AttributeError", "transformers": "TypeError", "sglang": "AttributeError"},
        ),
    ],
)
def test_names_that_are_none(declared: dict[str, Any], expected: dict[str, str]) -> None:
    for engine in ENGINES:
        found = built(declared, engine)["o"]
        name = found.exception if isinstance(found, Refusal) else str(found)
        assert name == expected[engine.family]


def test_sglang_takes_a_nameless_algorithm_for_modelopts() -> None:
    assert isinstance(built({"quant_algo": "FP8"}, SGLANG)["o"], NotAnalysed)


def test_where_each_engine_looks() -> None:
    top, old, text = ({"quant_method": name} for name in ("gptq", "compressed-tensors", "awq"))
    file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    config = {
        "quantization_config": top,
        "compression_config": old,
        "text_config": {"quantization_config": text},
    }
    objects = {"hf_quant_config.json": file}

    def found(*absent: str) -> list[Any]:
        left = {key: value for key, value in config.items() if key not in absent}
        blocks = [declared_block(family, left, objects) for family in Family]
        return [one and one["quant_method"] for one in blocks]

    assert found() == ["gptq"] * 3
    assert found("quantization_config") == ["modelopt", "awq", "awq"]
    assert found("quantization_config", "text_config") == ["modelopt", None, "compressed-tensors"]
    objects.clear()
    assert found("quantization_config") == ["compressed-tensors", "awq", "awq"]
    assert found("quantization_config", "compression_config") == ["awq"] * 3
    assert found(*config) == [None] * 3


@pytest.mark.parametrize("value", [3, "gptq", [], None])
def test_what_is_no_declaration(value: Any) -> None:
    config = {"quantization_config": value, "text_config": value}
    assert {declared_block(family, config, {}) for family in Family} == {None}
