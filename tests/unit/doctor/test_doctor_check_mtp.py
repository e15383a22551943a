"""The MTP head as a whole."""

from __future__ import annotations

import pytest
from support.doctor_cases import (
    FORMATS,
    MODEL,
    block_of,
    case_of,
    case_of_snapshot,
    dense_headers,
    findings,
    outcomes,
    pack,
    put,
    snapshot_of,
    sound_headers,
    tiny_config,
)

from nybble.doctor.checks import mtp
from nybble.doctor.findings import Harm, Part, Severity


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_to_say_of_a_bf16_head(form: str) -> None:
    assert findings(mtp.CHECKS, case_of(sound_headers(form), block_of(form))) == []


def test_head_that_the_config_does_not_call_for() -> None:
    config = tiny_config()
    config["text_config"]["mtp_num_hidden_layers"] = 0
    snapshot = snapshot_of({MODEL: dense_headers()}, config=config)
    (finding,) = findings(mtp.CHECKS, case_of_snapshot(snapshot))
    assert (finding.code, finding.severity) == ("D3", Severity.WARNING)
    assert "15 tensors" in finding.seen
    told = outcomes(finding, Part.MTP)
    assert set(told.values()) == {(Harm.ABSENT, None)}
    assert "transformers-5.23" not in told


def test_no_head_and_none_called_for() -> None:
    config = tiny_config()
    config["text_config"]["mtp_num_hidden_layers"] = 0
    headers = {n: t for n, t in dense_headers().items() if not n.startswith("mtp.")}
    snapshot = snapshot_of({MODEL: headers}, config=config)
    assert findings(mtp.CHECKS, case_of_snapshot(snapshot)) == []


@pytest.mark.parametrize(
    ("name", "severity", "repair"),
    [
        ("mtp.layers.0.mlp.down_proj", Severity.NOTE, None),
        ("mtp.fc", Severity.WARNING, "graft-mtp"),
    ],
)
def test_quantized_head(name: str, severity: Severity, repair: str | None) -> None:
    headers = sound_headers("gptq")
    pack(headers, name, "gptq")
    (finding,) = findings(mtp.CHECKS, case_of(headers, block_of("gptq")))
    assert (finding.code, finding.severity, finding.repair) == ("D3", severity, repair)
    assert finding.where == name


def test_head_in_another_type_than_the_rest() -> None:
    headers = dense_headers()
    for name in [name for name in headers if name.startswith("mtp.")]:
        put(headers, name, "F16", *headers[name].shape)
    (finding,) = findings(mtp.CHECKS, case_of(headers))
    assert (finding.code, finding.severity) == ("D3", Severity.WARNING)
    for name in headers:
        put(headers, name, "F16", *headers[name].shape)
    assert findings(mtp.CHECKS, case_of(headers)) == []
