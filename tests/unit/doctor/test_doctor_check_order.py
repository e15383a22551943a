"""Groups sorted by activation."""

from __future__ import annotations

from typing import Any

import pytest
from support.doctor_cases import block_of, case_of, findings, outcomes, sound_headers

from nybble.doctor.checks import order, resolution
from nybble.doctor.engines import chosen_engines
from nybble.doctor.findings import Finding, Harm, Part, Severity


def found(form: str, block: Any, version: str | None = None) -> list[Finding]:
    engines = chosen_engines("all" if version is None else "vllm", version)
    return findings(order.CHECKS, case_of(sound_headers(form), block, engines))


def sorted_by(form: str, **values: Any) -> dict[str, Any]:
    block = block_of(form)
    if form == "compressed-tensors":
        block["config_groups"]["group_0"]["weights"] |= values
    else:
        block |= values
    return block


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("gptq", {}),
        ("gptq", {"desc_act": True, "group_size": -1}),
        ("compressed-tensors", {"actorder": None}),
        ("compressed-tensors", {"actorder": "static"}),
        ("compressed-tensors", {"actorder": "weight"}),
    ],
)
def test_static_groups_are_fine(form: str, values: dict[str, Any]) -> None:
    assert found(form, sorted_by(form, **values)) == []


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("gptq", {"desc_act": True}),
        ("gptq", {"dynamic": {"+:.*down_proj": {"desc_act": True}}}),
        ("compressed-tensors", {"actorder": "group"}),
    ],
)
def test_sorted_groups_are_refused_by_new_releases(form: str, values: dict[str, Any]) -> None:
    (finding,) = found(form, sorted_by(form, **values))
    assert (finding.code, finding.severity, finding.repair) == ("D8", Severity.ERROR, "desc-act")
    told = outcomes(finding, Part.TRUNK)
    assert told["vllm-0.30"] == (Harm.REFUSED, "ValueError")
    assert "vllm-0.19" not in told


def test_an_old_release_alone_gets_a_warning() -> None:
    (finding,) = found("gptq", sorted_by("gptq", desc_act=True), "0.24")
    assert (finding.severity, finding.hits) == (Severity.WARNING, ())


def test_without_g_idx_nothing_tells_the_order() -> None:
    headers = sound_headers("gptq")
    for name in [name for name in headers if name.endswith(".g_idx")]:
        del headers[name]
    case = case_of(headers, sorted_by("gptq", desc_act=True))
    (finding,) = findings(order.CHECKS, case)
    told = outcomes(finding, Part.TRUNK)
    assert told["vllm-0.24"] == (Harm.RANDOM, None)
    assert told["vllm-0.30"] == (Harm.REFUSED, "ValueError")
    assert "without g_idx" in finding.seen


def test_a_missing_desc_act_is_a_matter_of_the_declaration() -> None:
    block = block_of("gptq")
    del block["desc_act"]
    case = case_of(sound_headers("gptq"), block)
    assert findings(order.CHECKS, case) == []
    assert "D1" in {finding.code for finding in findings(resolution.CHECKS, case)}


@pytest.mark.parametrize(
    "value", [None, 1, "x", [], {}, {"group_0": 3}, {"group_0": {"weights": 1}}]
)
def test_any_json_may_stand_anywhere(value: Any) -> None:
    for key in ("dynamic", "config_groups", "desc_act", "group_size"):
        for finding in found("gptq", {**block_of("gptq"), key: value}):
            assert finding.code == "D8"
