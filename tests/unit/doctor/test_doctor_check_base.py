"""D17: what was kept is there as in the base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.doctor_cases import (
    BLOCKS,
    FORMATS,
    MODEL,
    block_of,
    case_of,
    dense_headers,
    findings,
    info,
    outcomes,
    put,
    snapshot_of,
    sound_headers,
    tiny_config,
)
from support.moe_checkpoints import Moe, moe_config

from nybble.doctor.case import Case
from nybble.doctor.checks import base
from nybble.doctor.engines import ENGINES
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.layout.registry import layout_of

NORM = f"{BLOCKS}.0.input_layernorm.weight"
A_LOG = f"{BLOCKS}.0.linear_attn.A_log"


def case(form: str = "gptq", **changes: Any) -> Case:
    """A sound checkpoint beside its base, ``without`` tensors and with others ``put``."""
    headers = sound_headers(form)
    for start in changes.get("without", ()):
        for name in [name for name in headers if name.startswith(start)]:
            del headers[name]
    for name, (dtype, *shape) in changes.get("put", {}).items():
        put(headers, name, dtype, *shape)
    of = case_of(headers, block_of(form))
    return replace(of, base=snapshot_of({MODEL: changes.get("base", dense_headers())}))


def found(of: Case) -> list[Finding]:
    return findings(base.CHECKS, of)


def only(of: Case) -> Finding:
    (finding,) = found(of)
    assert finding.code == "D17"
    return finding


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_wrong_beside_the_base(form: str) -> None:
    assert not found(case(form))


def test_without_a_base_nothing_is_compared() -> None:
    assert not found(replace(case(without=["mtp."]), base=None))


def test_dropped_mtp_head() -> None:
    finding = only(case(without=["mtp."]))
    assert finding.severity is Severity.ERROR
    assert finding.seen.startswith("15 tensors")
    assert outcomes(finding, Part.MTP)["vllm-0.30"] == (Harm.RANDOM, None)
    assert "transformers-5.23" not in outcomes(finding, Part.MTP)
    assert finding.repair == "graft-mtp"


def test_dropped_tower_and_dropped_head_are_two_findings() -> None:
    first, second = found(case(without=["model.visual.", "lm_head."]))
    assert (first.where, second.where.split(".")[1]) == ("lm_head.weight", "visual")
    assert {hit.part for hit in second.hits} == {Part.VISION}


def test_what_the_config_does_not_call_for_may_be_gone() -> None:
    of = case(without=["mtp."])
    values = tiny_config()
    del values["text_config"]["mtp_num_hidden_layers"]
    snapshot = replace(of.snapshot, config={**values, "quantization_config": of.block})
    assert of.layout is not None
    headless = replace(of.layout, has_mtp=False, tensors={}, linears={}, stacks={})
    finding = only(replace(of, snapshot=snapshot, layout=headless))
    assert (finding.severity, finding.hits) == (Severity.WARNING, ())


def test_casts_by_what_they_lose() -> None:
    headers = dense_headers()
    put(headers, A_LOG, "F32", 6)
    assert "A_log" in only(case(base=headers)).consequence
    half = only(case(put={NORM: ("F16", 256)}))
    assert (half.severity, "65504" in half.consequence) == (Severity.WARNING, True)
    assert only(case(put={NORM: ("F32", 256)})).severity is Severity.NOTE


def test_other_shape_than_the_base() -> None:
    finding = only(case(put={NORM: ("BF16", 128)}))
    assert (finding.where, finding.severity) == (NORM, Severity.ERROR)


def test_tensor_that_the_base_has_not() -> None:
    finding = only(case(put={"model.extra.weight": ("BF16", 4)}))
    assert (finding.where, finding.severity) == ("model.extra.weight", Severity.NOTE)


def test_base_that_is_quantized_itself() -> None:
    of = case()
    quantized = snapshot_of({MODEL: sound_headers("gptq")}, block_of("gptq"))
    source = type("Here", (), {"label": "the/base"})()
    finding = only(replace(of, base=replace(quantized, source=source)))
    assert (finding.where, finding.severity) == ("--base", Severity.WARNING)


def test_weights_in_a_type_of_their_own_are_quantized_not_changed() -> None:
    name = f"{BLOCKS}.3.self_attn.o_proj"
    of = case(without=[f"{name}."], put={f"{name}.weight": ("F8_E4M3", 256, 384)})
    assert not found(of)


def test_experts_in_a_stack_and_one_by_one_are_the_same() -> None:
    config = moe_config(Moe())
    layout = layout_of(config)
    assert layout is not None and layout.stacks
    stacked = {name: info(name, "BF16", 2, 8, 8) for name in layout.stacks}
    single = {
        f"{member}.weight": info(f"{member}.weight", "BF16", 8, 8)
        for members in layout.stacks.values()
        for member in members
    }
    packed = {
        name.replace(".weight", ".qweight"): info(name.replace(".weight", ".qweight"), "I32", 1, 8)
        for name in single
    }
    for theirs, ours in ((stacked, single), (single, stacked), (stacked, packed)):
        snapshot = snapshot_of({MODEL: ours}, config=config)
        original = snapshot_of({MODEL: theirs}, config=config)
        of = Case(snapshot, None, layout, None, {}, (), ENGINES, original)
        assert not found(of)
    lacking = dict(list(single.items())[1:])
    of = replace(of, snapshot=snapshot_of({MODEL: lacking}), base=snapshot_of({MODEL: stacked}))
    assert only(of).severity is Severity.ERROR
