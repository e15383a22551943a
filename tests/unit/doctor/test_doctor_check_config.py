"""D1 and D16: config.json missing, silent, or of another model than the base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.doctor_cases import (
    FORMATS,
    MODEL,
    Headers,
    block_of,
    case_of_snapshot,
    dense_headers,
    findings,
    info,
    outcomes,
    snapshot_of,
    sound_headers,
    tiny_config,
)

from nybble.doctor.case import Case
from nybble.doctor.checks import config
from nybble.doctor.engines import ENGINES, chosen_engines
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.snapshot import Problem, ProblemKind

Change = Callable[[dict[str, Any]], object]


def case(
    change: Change = lambda _: None, headers: Headers | None = None, block: Any = None
) -> Case:
    """The sound checkpoint with another config.json."""
    values = tiny_config()
    change(values)
    found = headers if headers is not None else sound_headers("gptq")
    return case_of_snapshot(snapshot_of({MODEL: found}, block or block_of("gptq"), values))


def found(of: Case) -> list[Finding]:
    return findings(config.CHECKS, of)


def only(of: Case) -> Finding:
    (finding,) = found(of)
    return finding


def bare(values: Mapping[str, Any] | None, headers: Headers | None = None) -> Case:
    """A case of which no engine was simulated."""
    snapshot = replace(snapshot_of({MODEL: headers or {}}), config=values)
    return Case(snapshot, None, None, None, {}, (), ENGINES)


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_with_a_sound_config(form: str) -> None:
    sound = case(headers=sound_headers(form), block=block_of(form))
    assert not found(sound)
    assert not found(replace(sound, base=snapshot_of({MODEL: dense_headers()})))


def test_missing_config_and_unusable_numbers() -> None:
    assert "missing" in only(bare(None)).seen
    problem = Problem(ProblemKind.UNREADABLE_CONFIG, "config.json", "not valid JSON: line 1")
    snapshot = replace(bare(None).snapshot, problems=(problem,))
    finding = only(replace(bare(None), snapshot=snapshot))
    assert (finding.code, finding.seen) == ("D1", "not valid JSON: line 1")
    assert len(finding.hits) == len(ENGINES)
    unusable = replace(bare({"dtype": "bfloat16"}), layout_problem="hidden_size is -1")
    assert only(unusable).seen == "hidden_size is -1"


@pytest.mark.parametrize("beside", ["", "quantize_config.json"])
def test_packed_tensors_that_nothing_declares(beside: str) -> None:
    values = {"dtype": "bfloat16"}
    undeclared = bare(values, sound_headers("gptq"))
    sizes = {**undeclared.snapshot.sizes, **({beside: 1} if beside else {})}
    finding = only(replace(undeclared, snapshot=replace(undeclared.snapshot, sizes=sizes)))
    assert (finding.code, finding.severity) == ("D1", Severity.ERROR)
    assert beside in finding.seen
    assert finding.repair == "rules"
    assert not found(bare(values, dense_headers()))


def test_declaration_that_is_no_object_or_names_no_method() -> None:
    finding = only(bare({"dtype": "bfloat16", "quantization_config": ["gptq"]}))
    assert "no object" in finding.seen
    assert len(finding.hits) == len(ENGINES)
    unnamed = replace(bare({"dtype": "bfloat16"}), block={"bits": 4})
    assert "quant_method" in only(unnamed).seen


def test_declaration_elsewhere_is_found_by_some_engines() -> None:
    """vLLM and SGLang read compression_config, Transformers does not."""
    values = {"dtype": "bfloat16", "compression_config": {"quant_method": "compressed-tensors"}}
    of = bare(values, sound_headers("compressed-tensors"))
    assert "compression_config" in only(of).seen
    assert not found(replace(of, engines=chosen_engines("vllm")))


def test_text_only_form_has_no_mtp_before_0_28() -> None:
    values = tiny_config()
    text = {**values["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    layout = layout_of(text)
    finding = only(replace(bare(text), layout=layout))
    assert finding.code == "D16"
    refused = (Harm.REFUSED, "NotImplementedError")
    ids = ("vllm-0.19", "vllm-0.24", "vllm-0.26")
    assert outcomes(finding, Part.MTP) == dict.fromkeys(ids, refused)
    newest = replace(bare(text), layout=layout, engines=chosen_engines("vllm", "0.32"))
    assert only(newest).severity is Severity.NOTE


def _float16(values: dict[str, Any]) -> None:
    values["dtype"] = "float16"


def _old_spelling(values: dict[str, Any]) -> None:
    del values["dtype"]
    values["torch_dtype"] = "torch.float16"


def _no_dtype(values: dict[str, Any]) -> None:
    del values["dtype"], values["text_config"]["dtype"]


@pytest.mark.parametrize("change", [_float16, _old_spelling, _no_dtype])
def test_dtype_that_is_not_what_the_weights_were_made_for(change: Change) -> None:
    finding = only(case(change))
    assert (finding.code, finding.severity) == ("D16", Severity.WARNING)
    assert finding.repair == "dtype"


def test_float16_is_fine_for_what_always_was() -> None:
    tensor = "model.embed_tokens.weight"
    of = bare({"dtype": "float16"}, {tensor: info(tensor, "F16", 4, 4)})
    assert not found(of)
    base = replace(snapshot_of({}), config={"dtype": "bfloat16"})
    assert "65504" in only(replace(of, base=base)).consequence


def _untie_inside(values: dict[str, Any]) -> None:
    values["tie_word_embeddings"] = True


def _tie_inside(values: dict[str, Any]) -> None:
    values["text_config"]["tie_word_embeddings"] = True


def headless() -> Headers:
    headers = sound_headers("gptq")
    del headers["lm_head.weight"]
    return headers


def test_levels_that_disagree_about_the_output_head() -> None:
    """vLLM asks text_config, SGLang the top level; a stored head tells only some of them."""
    ids = [engine.id for engine in ENGINES if engine.family == "vllm"]
    wrong, random = (Harm.WRONG, None), (Harm.RANDOM, None)
    stored = only(case(_tie_inside))
    assert outcomes(stored, Part.TRUNK) == dict.fromkeys(ids, wrong)
    assert "false" in stored.fix
    assert outcomes(only(case(_untie_inside)), Part.TRUNK) == {"sglang-0.5": wrong}
    dropped = only(case(_untie_inside, headless()))
    assert outcomes(dropped, Part.TRUNK) == dict.fromkeys(ids, random)
    assert "true" in dropped.fix


def _swap_layers(values: dict[str, Any]) -> None:
    values["text_config"]["layer_types"].reverse()


def _drop_vision(values: dict[str, Any]) -> None:
    values["vision_config"]["depth"] = 1


def _drop_mtp(values: dict[str, Any]) -> None:
    del values["text_config"]["mtp_num_hidden_layers"]


def _harmless(values: dict[str, Any]) -> None:
    values["text_config"]["max_position_embeddings"] = 4096
    values["transformers_version"] = "5.0.0"
    values["text_config"]["a_new_key"] = 1
    del values["text_config"]["attention_bias"]


@pytest.mark.parametrize(
    ("change", "part"),
    [(_swap_layers, Part.TRUNK), (_drop_vision, Part.VISION), (_drop_mtp, Part.TRUNK)],
)
def test_values_that_differ_from_the_base(change: Change, part: Part) -> None:
    finding = only(replace(case(change), base=snapshot_of({MODEL: dense_headers()})))
    assert (finding.code, finding.severity) == ("D16", Severity.ERROR)
    assert set(outcomes(finding, part)) == {engine.id for engine in ENGINES}


def test_values_that_may_differ_from_the_base() -> None:
    assert not found(replace(case(_harmless), base=snapshot_of({MODEL: dense_headers()})))


def test_text_only_form_of_a_base_that_sees() -> None:
    values = tiny_config()
    text = {**values["text_config"], "architectures": ["Qwen3_5ForCausalLM"]}
    base = snapshot_of({MODEL: dense_headers()})
    of = replace(bare(text), layout=layout_of(text), base=base)
    assert "config.json: architectures" in {finding.where for finding in found(of)}
    assert all(finding.code == "D16" for finding in found(of))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = ("dtype", "torch_dtype", "tie_word_embeddings", "text_config", "vision_config")


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from((*KEYS, "quantization_config")), JSON), JSON)
def test_no_config_makes_it_raise(values: dict[str, Any], original: Any) -> None:
    of = bare({**tiny_config(), **values}, sound_headers("gptq"))
    layout = layout_of(tiny_config())
    base = replace(snapshot_of({}), config=original if isinstance(original, dict) else None)
    for one in (of, replace(of, layout=layout), replace(of, base=base)):
        for finding in found(one):
            assert "\n" not in finding.seen + finding.where


def test_deep_nesting_differs_without_raising() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"x": deep}
    base = replace(snapshot_of({}), config={"text_config": {"y": deep}, "dtype": "bfloat16"})
    other = copy.copy(deep)
    other["z"] = 1
    values = {"text_config": {"y": other}, "dtype": "bfloat16"}
    assert "y" in only(replace(bare(values), base=base)).where
