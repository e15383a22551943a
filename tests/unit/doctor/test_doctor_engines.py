from __future__ import annotations

import pytest

from nybble.core.errors import RecipeError
from nybble.doctor.engines import ENGINES, Family, chosen_engines


def test_all_engines_are_asked_unless_one_is_named() -> None:
    assert chosen_engines() == ENGINES
    assert {engine.family for engine in chosen_engines("vllm")} == {Family.VLLM}


@pytest.mark.parametrize(
    ("version", "rules"),
    [
        ("0.19.1", "vllm-0.19"),
        ("0.23", "vllm-0.19"),
        ("0.25.0", "vllm-0.24"),
        ("v0.26.0", "vllm-0.26"),
        ("0.28.0rc1", "vllm-0.28"),
        ("0.32", "vllm-0.30"),
        ("0.45", "vllm-0.30"),
        ("1.0", "vllm-0.30"),
    ],
)
def test_a_release_has_the_rules_of_its_time(version: str, rules: str) -> None:
    assert [engine.id for engine in chosen_engines("vllm", version)] == [rules]


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("ollama", None, "'ollama' is unknown: give vllm, transformers, sglang or all"),
        ("all", "0.32", "needs --engine"),
        ("vllm", "latest", "'latest' is no release"),
        ("vllm", "0.18", "no rules are known for vllm 0.18: the oldest are those of 0.19"),
    ],
)
def test_what_is_no_engine_is_refused(name: str, version: str | None, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chosen_engines(name, version)


def test_labels_name_the_span_of_releases() -> None:
    assert [engine.label for engine in ENGINES][:2] == ["vLLM 0.19-0.23", "vLLM 0.24-0.25"]
    assert ENGINES[0].joined(ENGINES[4]).label == "vLLM 0.19-0.32"
