"""D12 to D15: rules that some engine does not read as they are meant, and declarations to mend."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.doctor_cases import (
    BLOCKS,
    FORMATS,
    Headers,
    block_of,
    case_of,
    findings,
    outcomes,
    sound_headers,
    unpack,
)

from nybble.doctor.case import Case
from nybble.doctor.checks import exclusions, rules
from nybble.doctor.checks.rule_reading import can_run_away, flat, rules_of
from nybble.doctor.findings import Finding, Harm, Part, Severity

CHECKS = (*rules.CHECKS, *exclusions.CHECKS)
O_PROJ = f"{BLOCKS}.3.self_attn.o_proj"
BF16 = {"bits": 16, "data_type": "fp"}
OLD, NEW = ("vllm-0.19", "vllm-0.24"), ("vllm-0.26", "vllm-0.28", "vllm-0.30")
CODES = {"auto_round": "D12", "gptq": "D14", "compressed-tensors": "D15"}


def case(block: Mapping[str, Any], headers: Headers | None = None) -> Case:
    """A checkpoint under this declaration, stored as the declaration's own format has it."""
    names = {"auto-round": "auto_round"}
    form = names.get(block["quant_method"], block["quant_method"])
    return case_of(sound_headers(form) if headers is None else headers, dict(block))


def found(block: Mapping[str, Any], headers: Headers | None = None) -> list[Finding]:
    return findings(CHECKS, case(block, headers))


def only(block: Mapping[str, Any], headers: Headers | None = None) -> Finding:
    (finding,) = found(block, headers)
    return finding


def replaced(form: str, word: str, *rules: str) -> dict[str, Any]:
    """A declaration with these rules in the place of those with this word."""
    block = block_of(form)
    if form == "auto_round":
        kept = {rule: one for rule, one in block["extra_config"].items() if word not in rule}
        block["extra_config"] = kept | dict.fromkeys(rules, BF16)
    elif form == "gptq":
        kept = {rule: one for rule, one in block["dynamic"].items() if word not in rule}
        block["dynamic"] = kept | {f"-:{rule}": {} for rule in rules}
    else:
        kept = [rule for rule in block["ignore"] if word not in rule]
        block["ignore"] = kept + [f"re:{rule}" for rule in rules]
    return block


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_with_portable_rules(form: str) -> None:
    assert not found(block_of(form))


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_dense_mtp_head_that_no_rule_names(form: str) -> None:
    finding = only(replaced(form, "mtp"))
    assert (finding.code, finding.severity) == (CODES[form], Severity.ERROR)
    mtp = outcomes(finding, Part.MTP)
    assert {mtp[engine][0] for engine in OLD} == {Harm.RANDOM}
    assert {mtp[engine][0] for engine in NEW} == {Harm.REFUSED}
    assert not outcomes(finding, Part.TRUNK)
    assert finding.repair == "rules"


def test_autorounds_list_that_names_the_mtp_head() -> None:
    block = replaced("auto_round", "mtp")
    block["block_name_to_quantize"] = [BLOCKS, "mtp.layers"]
    finding = only(block)
    assert (finding.code, finding.severity) == ("D12", Severity.ERROR)
    assert "'mtp.layers' in block_name_to_quantize" in finding.seen


def test_gptqs_entry_that_is_part_of_other_names() -> None:
    block = replaced("gptq", "visual")
    block["modules_in_block_to_quantize"].append(["mlp"])
    finding = next(one for one in found(block) if outcomes(one, Part.VISION))
    assert finding.code == "D14"
    assert "'mlp' in modules_in_block_to_quantize picks visual.blocks." in finding.seen


def test_transformers_reads_no_dynamic_rules_of_gptq() -> None:
    """Without the list it packs in_proj_a and in_proj_b, whatever ``dynamic`` says."""
    block = block_of("gptq")
    del block["modules_in_block_to_quantize"]
    finding = only(block)
    assert finding.code == "D14"
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.RANDOM, None)}
    assert "modules_in_block_to_quantize" in finding.fix


@pytest.mark.parametrize("rule", ["mtp", "model.visual"])
def test_bare_prefix_means_all_below_and_matches_nothing(rule: str) -> None:
    block = replaced("compressed-tensors", rule.rpartition(".")[2])
    block["ignore"].append(rule)
    finding = only(block)
    assert (finding.code, finding.severity) == ("D13", Severity.ERROR)
    assert finding.where == f"ignore: {rule}"
    assert {hit.engine.id for hit in finding.hits} >= {*OLD, *NEW}


ESCAPED = r"^model\.language_model\.layers\.\d+\.linear_attn\.in_proj_(a|b|ba)$"


@pytest.mark.parametrize("form", ["auto_round", "compressed-tensors"])
def test_escaped_prefix_is_for_transformers_alone(form: str) -> None:
    finding = only(replaced(form, "in_proj", ESCAPED))
    assert finding.code == "D13"
    assert {*OLD, *NEW} <= set(outcomes(finding, Part.TRUNK))
    assert "transformers-5.23" not in outcomes(finding, Part.TRUNK)


def test_rule_that_is_lost_but_not_needed_is_a_warning() -> None:
    """The MTP head's rule is anchored in names it has nowhere; the list of blocks leaves it out."""
    finding = only(replaced("auto_round", "visual", r"^model\.visual\..*"))
    assert (finding.code, finding.severity, finding.hits) == ("D13", Severity.WARNING, ())


def test_rules_that_make_up_for_each_other_are_fine() -> None:
    assert not found(replaced("compressed-tensors", "visual", "visual.*", r"model\.visual.*"))


def test_exact_names_as_autoround_writes_them_are_lost_on_sglang_alone() -> None:
    names = [f"{BLOCKS}.{n}.linear_attn.in_proj_{x}" for n in range(3) for x in "ab"]
    finding = only(replaced("auto_round", "in_proj", *names))
    assert outcomes(finding, Part.TRUNK) == {"sglang-0.5": (Harm.RANDOM, None)}
    assert finding.seen.startswith("6 rules")


@pytest.mark.parametrize("form", FORMATS)
def test_pattern_that_does_not_compile(form: str) -> None:
    block = replaced(form, "nothing", r".*mlp\.(gate_proj$")
    broken = [one for one in found(block) if "does not compile" in one.seen]
    assert [one.code for one in broken] == ["D13"]
    refused = {raises for hit in broken[0].hits if (raises := hit.raises)}
    assert refused == (set() if form == "auto_round" else {"re.error"})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rule", [".*(([a-z_.]+)+)+!$", "(a|b+)*x", "(x{900}){900}"])
def test_pattern_that_cannot_be_tried(form: str, rule: str) -> None:
    start = perf_counter()
    hostile = [one for one in found(replaced(form, "nothing", rule)) if "cannot" in one.seen]
    assert [(one.code, one.severity) for one in hostile] == [("D13", Severity.WARNING)]
    assert perf_counter() - start < 10


@pytest.mark.parametrize("form", FORMATS)
def test_rule_for_what_is_not_there_is_a_note(form: str) -> None:
    finding = only(replaced(form, "nothing", ".*router.*"))
    assert (finding.code, finding.severity) == ("D13", Severity.NOTE)


@pytest.mark.parametrize("pattern", ["(a+)+", "(?:x*)*", "((a+))+", "(a|b+)*", "([a-z]+){2,}"])
def test_patterns_that_run_away(pattern: str) -> None:
    assert can_run_away(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*in_proj_(a|b|ba)$",
        r".*layers\.\d+\.(self_attn|mlp)\.",
        r"(\d+\.)+x",
        r"[(a+)+]",
        r"\(a+\)+",
        r"(?:.*\.)?mtp",
        r"(a+)b",
    ],
)
def test_patterns_that_do_not(pattern: str) -> None:
    assert not can_run_away(pattern)
    assert re.compile(pattern)


def test_entry_without_bits_is_dense_to_vllm() -> None:
    block = block_of("auto_round")
    block["extra_config"][O_PROJ] = {"group_size": 128, "sym": True}
    finding = next(one for one in found(block) if "without bits" in one.seen)
    assert (finding.code, finding.severity) == ("D12", Severity.ERROR)
    assert set(outcomes(finding, Part.TRUNK)) >= {*OLD, *NEW}
    # Of a Linear that is fused with others, it is the default that counts.
    headers = sound_headers("auto_round")
    unpack(headers, O_PROJ)
    assert all(not one.hits for one in found(block, headers) if "without bits" in one.seen)


def test_blocks_by_the_text_models_name() -> None:
    block = block_of("auto_round") | {"block_name_to_quantize": "model.layers"}
    finding = only(block)
    assert (finding.code, finding.severity) == ("D12", Severity.ERROR)
    assert BLOCKS in finding.fix
    assert outcomes(finding, Part.TRUNK)["vllm-0.24"] == (Harm.RANDOM, None)
    half = block_of("auto_round") | {"block_name_to_quantize": f"model.layers,{BLOCKS}"}
    assert only(half).severity is Severity.WARNING


def test_flat_list_of_modules() -> None:
    block = block_of("gptq")
    block["modules_in_block_to_quantize"] = list(flat(block["modules_in_block_to_quantize"]))
    finding = only(block)
    assert finding.code == "D14"
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.REFUSED, "TypeError")}


def test_mtp_head_that_is_dense_by_luck_under_gptq() -> None:
    """The list derived from headers keeps it dense in vLLM; SGLang has none."""
    block = replaced("gptq", "mtp")
    del block["modules_in_block_to_quantize"]
    vllm = replace(case(block), simulations=case(block).simulations[:5])
    lucky = [one for one in findings(CHECKS, vllm) if one.where == "dynamic"]
    assert [(one.code, one.severity) for one in lucky] == [("D14", Severity.WARNING)]
    assert {"sglang-0.5": (Harm.RANDOM, None)} in [outcomes(o, Part.MTP) for o in found(block)]


def test_rule_that_quantizes_a_dense_mtp_head() -> None:
    block = replaced("gptq", "mtp")
    block["dynamic"]["+:.*mtp.*"] = {"bits": 8}
    adding = next(one for one in found(block) if one.where == "dynamic: +:.*mtp.*")
    assert (adding.code, adding.severity) == ("D14", Severity.ERROR)
    both = block_of("gptq")
    both["dynamic"][r"+:.*layers\.0\.mlp\.up_proj$"] = {"bits": 4}
    assert not [one for one in found(both) if one.where.startswith("dynamic: +")]


def test_two_declarations_and_notes_of_gptqmodel() -> None:
    of = case(block_of("gptq") | {"meta": {"quantizer": ["gptqmodel:4"]}})
    objects = {"quantize_config.json": {"bits": 8, "group_size": 128, "model_name": None}}
    of = replace(of, snapshot=replace(of.snapshot, objects=objects))
    got = {one.where: one.severity for one in findings(CHECKS, of)}
    assert got == {
        "quantize_config.json: bits": Severity.WARNING,
        "quantization_config: meta": Severity.NOTE,
    }


@pytest.mark.parametrize("status", ["frozen", None])
def test_status_with_which_transformers_builds_nothing_packed(status: str | None) -> None:
    block = block_of("compressed-tensors") | {"quantization_status": status}
    if status is None:
        del block["quantization_status"]
    finding = only(block)
    assert (finding.code, finding.where) == ("D15", "quantization_status")
    assert outcomes(finding, Part.TRUNK) == {"transformers-5.23": (Harm.RANDOM, None)}


def test_packed_words_by_another_formats_name() -> None:
    block = block_of("compressed-tensors")
    block["format"] = block["config_groups"]["group_0"]["format"] = "int-quantized"
    finding = only(block)
    assert (finding.code, finding.where) == ("D15", "config.format")
    assert {raises for _, raises in outcomes(finding, Part.TRUNK).values()} != {None}
    del block["format"], block["config_groups"]["group_0"]["format"]
    assert only(block).where == "format"


def test_key_that_compressed_tensors_forbids() -> None:
    block = block_of("compressed-tensors")
    block["config_groups"]["group_0"]["weights"]["rounding"] = "nearest"
    finding = only(block)
    assert "rounding" in finding.seen
    assert set(outcomes(finding, Part.TRUNK).values()) == {(Harm.REFUSED, "ValidationError")}
    assert len(finding.hits) == 7


def test_rules_of_what_is_no_declaration() -> None:
    assert rules_of(None) == []
    assert rules_of({"quant_method": 3, "ignore": ["x"]}) == []
    assert rules_of({"quant_method": "gptq", "dynamic": ["x"]}) == []
    assert [rule.text for rule in rules_of({"quant_method": "gptq", "dynamic": {"-:x": 1}})] == [
        "x"
    ]


TEXTS = st.sampled_from(["mtp", "re:", ".*mtp.*", "-:(", "lm_head", BLOCKS, "", "gptq", "re:.*\\"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 20) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    "quant_method",
    "extra_config",
    "block_name_to_quantize",
    "dynamic",
    "modules_in_block_to_quantize",
    "ignore",
    "config_groups",
    "format",
    "quantization_status",
    "bits",
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_no_declaration_makes_it_raise(form: str, values: dict[str, Any]) -> None:
    of = case_of(sound_headers(form), block_of(form) | values)
    for finding in findings(CHECKS, of):
        assert "\n" not in finding.seen + finding.where + finding.consequence
