"""What is built against what is stored: which code, which engines, which exception."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.doctor_cases import (
    BLOCKS,
    FORMATS,
    Headers,
    block_of,
    case_of,
    case_of_snapshot,
    dense_headers,
    findings,
    info,
    outcomes,
    pack,
    put,
    snapshot_of,
    sound_headers,
    tiny_layout,
    unpack,
)

from nybble.doctor.checks import resolution
from nybble.doctor.engines import ENGINES
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.layout.spec import Kind, Module
from nybble.doctor.resolve.built import Scheme, Storage
from nybble.doctor.simulate import Simulation

O_PROJ = f"{BLOCKS}.3.self_attn.o_proj"
DOWN = f"{BLOCKS}.0.mlp.down_proj"
GATE = f"{BLOCKS}.0.mlp.gate_proj"
UP = f"{BLOCKS}.0.mlp.up_proj"
OLD, NEW = ("vllm-0.19", "vllm-0.24"), ("vllm-0.26", "vllm-0.28", "vllm-0.30")
RANDOM, WRONG = (Harm.RANDOM, None), (Harm.WRONG, None)


def refused(exception: str) -> tuple[Harm, str | None]:
    return (Harm.REFUSED, exception)


def found(headers: Headers, block: object = None) -> list[Finding]:
    return findings(resolution.CHECKS, case_of(headers, block))


def only(headers: Headers, block: object = None) -> Finding:
    (finding,) = found(headers, block)
    return finding


def drop(headers: Headers, start: str) -> None:
    for name in [name for name in headers if name.startswith(start)]:
        del headers[name]


def without_rule(form: str, word: str) -> dict[str, object]:
    """A declaration of which the rules with this word are gone."""
    block = block_of(form)
    for key in ("extra_config", "dynamic"):
        if key in block:
            block[key] = {rule: value for rule, value in block[key].items() if word not in rule}
    if "ignore" in block:
        block["ignore"] = [rule for rule in block["ignore"] if word not in rule]
    if form == "auto_round":
        del block["block_name_to_quantize"]
    return block


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_with_a_sound_checkpoint(form: str) -> None:
    assert found(sound_headers(form), block_of(form)) == []


def test_nothing_is_wrong_with_the_base() -> None:
    assert found(dense_headers()) == []


@pytest.mark.parametrize(
    ("form", "count"), [("auto_round", 8), ("compressed-tensors", 8), ("gptq", 7)]
)
def test_mtp_built_quantized_but_stored_dense(form: str, count: int) -> None:
    finding = only(sound_headers(form), without_rule(form, "mtp"))
    assert (finding.code, finding.severity, finding.repair) == ("D4", Severity.ERROR, "rules")
    assert f"stored dense: {count} Linears" in finding.seen
    told = outcomes(finding, Part.MTP)
    assert {told[engine] for engine in (*OLD, "sglang-0.5")} == {RANDOM}
    # For GPTQ the list of modules leaves mtp.fc out: down_proj comes first then.
    assert {told[engine] for engine in NEW} == {refused("ValueError")}
    assert "transformers-5.23" not in told
    assert outcomes(finding, Part.TRUNK) == {}
    assert "0 % of drafts accepted" in finding.consequence
    assert "vLLM 0.26-0.32 stops with ValueError" in finding.consequence


@pytest.mark.parametrize("form", FORMATS)
def test_mtp_stored_packed_but_built_dense(form: str) -> None:
    headers = sound_headers(form)
    pack(headers, "mtp.layers.0.mlp.down_proj", form)
    finding = only(headers, block_of(form))
    assert (finding.code, finding.repair) == ("D4", "graft-mtp")
    told = outcomes(finding, Part.MTP)
    assert {told[engine] for engine in OLD} == {RANDOM}
    assert {told[engine] for engine in NEW} == {refused("ValueError")}


@pytest.mark.parametrize(
    ("names", "exception"),
    [
        ([O_PROJ], "ValueError"),
        ([GATE, UP], "AttributeError"),
        ([O_PROJ, GATE, UP], "AttributeError"),
        ([DOWN, GATE, UP], "ValueError"),
    ],
)
def test_the_exception_is_that_of_the_tensor_met_first(names: list[str], exception: str) -> None:
    headers = sound_headers("auto_round")
    for name in names:
        unpack(headers, name)
    finding = only(headers, block_of("auto_round"))
    assert finding.code == "D4"
    told = outcomes(finding, Part.TRUNK)
    assert {told[engine] for engine in NEW} == {refused(exception)}
    assert {told[engine] for engine in (*OLD, "sglang-0.5", "transformers-5.23")} == {RANDOM}


@pytest.mark.parametrize("form", FORMATS)
def test_other_bits_than_declared(form: str) -> None:
    headers = sound_headers(form)
    pack(headers, DOWN, form, bits=8)
    finding = only(headers, block_of(form))
    assert finding.code == "D4"
    assert "declared INT4 group 128" in finding.seen
    assert "stored INT8 group 128" in finding.seen
    told = outcomes(finding, Part.TRUNK)
    # Split along its inputs: vLLM takes the first half of the words for all of them, and only
    # stumbles over zero points.
    expected = WRONG if form == "compressed-tensors" else refused("AssertionError")
    assert {told[engine] for engine in (*OLD, *NEW)} == {expected}
    assert told["transformers-5.23"] == refused("RuntimeError")


def test_smaller_groups_than_declared_pass_unnoticed_where_inputs_are_split() -> None:
    headers = sound_headers("gptq")
    pack(headers, O_PROJ, "gptq", group=64)
    told = outcomes(only(headers, block_of("gptq")), Part.TRUNK)
    assert {told[engine] for engine in (*OLD, *NEW)} == {WRONG}
    headers = sound_headers("gptq")
    pack(headers, GATE, "gptq", group=64)
    pack(headers, UP, "gptq", group=64)
    told = outcomes(only(headers, block_of("gptq")), Part.TRUNK)
    assert {told[engine] for engine in (*OLD, *NEW)} == {refused("AssertionError")}


def test_one_group_of_all_inputs_is_one_scale_per_output() -> None:
    headers = sound_headers("auto_round")
    pack(headers, DOWN, "auto_round", group=-1)
    case = case_of(headers, block_of("auto_round"))
    linear = tiny_layout().linears[DOWN]
    for group_size, codes in ((640, []), (128, ["D4"])):
        module = Module(DOWN, (linear,), Kind.LINEAR, Part.TRUNK)
        built = ((module, Scheme(Storage.GPTQ, 4, group_size, True)),)
        alone = replace(case, simulations=(Simulation(ENGINES[4], None, built),))
        told = [finding.code for finding in findings(resolution.CHECKS, alone)]
        assert told == codes


def test_fused_linears_stored_in_two_ways() -> None:
    headers = sound_headers("gptq")
    unpack(headers, GATE)
    by_code = {finding.code: finding for finding in found(headers, block_of("gptq"))}
    assert by_code.keys() == {"D4", "D5"}
    told = outcomes(by_code["D5"], Part.TRUNK)
    assert {told[engine] for engine in NEW} == {refused("AttributeError")}
    assert {told[engine] for engine in OLD} == {RANDOM}
    # Transformers fuses nothing: there it is the one Linear that is declared wrongly.
    assert outcomes(by_code["D4"], Part.TRUNK) == {"transformers-5.23": RANDOM}


def test_fused_linears_declared_in_two_ways() -> None:
    block = block_of("compressed-tensors")
    block["ignore"].append(GATE)
    headers = sound_headers("compressed-tensors")
    unpack(headers, GATE)
    finding = only(headers, block)
    assert finding.code == "D5"
    told = outcomes(finding, Part.TRUNK)
    assert {told[engine] for engine in (*OLD, *NEW)} == {refused("ValueError")}
    assert "transformers-5.23" not in told


def test_the_same_reason_for_many_modules_is_one_finding() -> None:
    block = block_of("compressed-tensors")
    block["ignore"] += [f"{BLOCKS}.{number}.mlp.gate_proj" for number in range(4)]
    headers = sound_headers("compressed-tensors")
    for number in range(4):
        unpack(headers, f"{BLOCKS}.{number}.mlp.gate_proj")
    assert "8 Linears" in only(headers, block).seen


@pytest.mark.parametrize("form", FORMATS)
def test_missing_mtp_head(form: str) -> None:
    headers = sound_headers(form)
    drop(headers, "mtp.")
    finding = only(headers, block_of(form))
    assert (finding.code, finding.repair) == ("D3", "graft-mtp")
    assert "15 tensors" in finding.seen
    told = outcomes(finding, Part.MTP)
    assert {told[engine] for engine in (*OLD, *NEW, "sglang-0.5")} == {RANDOM}
    assert len(told) == 6


def test_missing_mtp_head_of_an_unquantized_checkpoint_is_refused() -> None:
    headers = dense_headers()
    drop(headers, "mtp.")
    told = outcomes(only(headers), Part.MTP)
    assert {told[engine] for engine in (*OLD, *NEW)} == {refused("ValueError")}
    assert told["sglang-0.5"] == RANDOM


def test_missing_linear_of_an_unquantized_checkpoint_is_not_noticed() -> None:
    headers = dense_headers()
    del headers["mtp.fc.weight"]
    finding = only(headers)
    assert finding.code == "D3"
    assert set(outcomes(finding, Part.MTP).values()) == {RANDOM}


def test_mtp_head_in_a_file_that_the_index_leaves_out() -> None:
    trunk, head = sound_headers("gptq"), {}
    for name in [name for name in trunk if name.startswith("mtp.")]:
        head[name] = trunk.pop(name)
    files = {"model-00001-of-00001.safetensors": trunk, "mtp.safetensors": head}
    weight_map = dict.fromkeys(trunk, "model-00001-of-00001.safetensors")
    for name, tensor in head.items():
        head[name] = info(name, tensor.dtype, *tensor.shape)
    snapshot = snapshot_of(files, block_of("gptq"), weight_map=weight_map)
    (finding,) = findings(resolution.CHECKS, case_of_snapshot(snapshot))
    assert (finding.code, finding.repair) == ("D3", "index")
    assert outcomes(finding, Part.MTP)["vllm-0.30"] == RANDOM


def test_mtp_of_another_shape() -> None:
    headers = dense_headers()
    put(headers, "mtp.fc.weight", "BF16", 512, 256)
    put(headers, "mtp.norm.weight", "BF16", 128)
    by_what = {finding.where: finding for finding in found(headers)}
    assert {finding.code for finding in by_what.values()} == {"D3"}
    told = outcomes(by_what["mtp.fc"], Part.MTP)
    assert {told[engine] for engine in (*OLD, *NEW)} == {refused("AssertionError")}
    assert "[512, 256], not [256, 512]" in by_what["mtp.fc"].seen


@pytest.mark.parametrize(
    ("form", "suffix", "engines"),
    [
        ("auto_round", "scales", 7),
        ("gptq", "qweight", 7),
        ("compressed-tensors", "weight_scale", 7),
        ("gptq", "qzeros", 1),
        ("gptq", "g_idx", 1),
        ("compressed-tensors", "weight_shape", 1),
    ],
)
def test_incomplete_linear(form: str, suffix: str, engines: int) -> None:
    headers = sound_headers(form)
    del headers[f"{O_PROJ}.{suffix}"]
    finding = only(headers, block_of(form))
    assert (finding.code, finding.where) == ("D6", O_PROJ)
    assert suffix in finding.seen
    told = outcomes(finding, Part.TRUNK)
    assert set(told.values()) == {RANDOM}
    assert len(told) == engines


def test_dense_weight_left_beside_the_packed_one() -> None:
    headers = sound_headers("auto_round")
    put(headers, f"{O_PROJ}.weight", "BF16", *tiny_layout().linears[O_PROJ].shape)
    finding = only(headers, block_of("auto_round"))
    assert finding.code == "D6"
    assert outcomes(finding, Part.TRUNK) == dict.fromkeys(NEW, refused("ValueError"))


def test_g_idx_of_a_checkpoint_that_is_not_declared() -> None:
    headers = dense_headers()
    put(headers, f"{O_PROJ}.g_idx", "I32", 384)
    finding = only(headers)
    assert outcomes(finding, Part.TRUNK) == dict.fromkeys(NEW, refused("ValueError"))


def test_missing_norm() -> None:
    name = f"{BLOCKS}.1.input_layernorm.weight"
    headers = sound_headers("gptq")
    del headers[name]
    finding = only(headers, block_of("gptq"))
    assert (finding.code, finding.where) == ("D6", name)
    assert set(outcomes(finding, Part.TRUNK).values()) == {WRONG}
    headers = dense_headers()
    del headers[name]
    told = outcomes(only(headers), Part.TRUNK)
    assert told.pop("sglang-0.5") == told.pop("transformers-5.23") == WRONG
    assert set(told.values()) == {refused("ValueError")}


def test_tensor_that_no_model_has() -> None:
    headers = dense_headers()
    put(headers, "model.language_model.mtp.fc.weight", "BF16", 1)
    put(headers, "model.language_model.rotary_emb.inv_freq", "F32", 1)
    finding = only(headers)
    assert finding.code == "D6"
    assert outcomes(finding, Part.TRUNK) == dict.fromkeys(NEW, refused("ValueError"))


def test_vision_tower_is_a_part_of_its_own() -> None:
    finding = only(sound_headers("auto_round"), without_rule("auto_round", "visual"))
    assert outcomes(finding, Part.TRUNK) == {}
    told = outcomes(finding, Part.VISION)
    assert {told[engine] for engine in OLD} == {refused("KeyError")}
    # SGLang never quantizes the tower.
    assert "sglang-0.5" not in told


def test_a_tower_that_cannot_be_built_stops_the_whole_engine() -> None:
    block = without_rule("compressed-tensors", "visual")
    told: dict[str, object] = {}
    for finding in found(sound_headers("compressed-tensors"), block):
        if "groups of 128 do not divide" in finding.seen:
            told |= outcomes(finding, Part.TRUNK)
    assert {told[engine] for engine in OLD} == {refused("AssertionError")}
    assert told["vllm-0.30"] == refused("ValueError")


def test_output_head_is_told_of_once_for_decoder_and_draft() -> None:
    headers = dense_headers()
    put(headers, "lm_head.weight", "BF16", 2048 - 64, 256)
    finding = only(headers)
    assert finding.code == "D7"
    assert outcomes(finding, Part.TRUNK)["vllm-0.30"] == refused("AssertionError")
    assert outcomes(finding, Part.MTP)["vllm-0.30"] == refused("AssertionError")
    # SGLang's draft never reads it.
    assert "sglang-0.5" not in outcomes(finding, Part.MTP)


def test_missing_output_head_harms_the_decoder_alone() -> None:
    headers = sound_headers("gptq")
    del headers["lm_head.weight"]
    finding = only(headers, block_of("gptq"))
    assert finding.code == "D6"
    assert set(outcomes(finding, Part.TRUNK).values()) == {RANDOM}
    assert outcomes(finding, Part.MTP) == {}


def test_codes_in_a_wider_type_are_worth_a_warning() -> None:
    headers = sound_headers("gptq")
    put(headers, f"{O_PROJ}.qweight", "I64", *headers[f"{O_PROJ}.qweight"].shape)
    finding = only(headers, block_of("gptq"))
    assert (finding.code, finding.severity, finding.hits) == ("D7", Severity.WARNING, ())


def test_weight_in_bytes_where_a_float_is_built() -> None:
    headers = dense_headers()
    put(headers, f"{O_PROJ}.weight", "F8_E4M3", *tiny_layout().linears[O_PROJ].shape)
    put(headers, f"{O_PROJ}.weight_scale", "F32")
    finding = only(headers)
    assert finding.code == "D4"
    told = outcomes(finding, Part.TRUNK)
    assert {told[engine] for engine in OLD} == {WRONG}
    assert {told[engine] for engine in NEW} == {refused("ValueError")}


def test_refused_declaration_is_one_finding_for_all_engines_with_the_same_reason() -> None:
    block = block_of("gptq")
    del block["bits"]
    refusals = [f for f in found(sound_headers("gptq"), block) if f.code == "D1"]
    hits = [hit for finding in refusals for hit in finding.hits]
    assert {hit.engine.id for hit in hits} >= {*OLD, *NEW}
    assert {(hit.part, hit.harm) for hit in hits} == {(Part.TRUNK, Harm.REFUSED)}
    assert len(refusals) < len(hits)


def test_what_is_not_analysed_is_a_note() -> None:
    (note,) = found(sound_headers("gptq"), {"quant_method": "quark"})
    assert (note.severity, note.hits) == (Severity.NOTE, ())
    assert "not analysed" in note.seen
    assert "vLLM 0.19-0.32, Transformers 5.23 and SGLang 0.5" in note.consequence
