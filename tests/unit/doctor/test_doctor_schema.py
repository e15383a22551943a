from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nybble.doctor.check import Report, check_checkpoint
from nybble.doctor.engines import ENGINES
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.schema import report_json, report_schema

SCHEMA_FILE = Path(__file__).parents[3] / "docs" / "schemas" / "check.json"


@pytest.fixture
def report(tiny_base: Path) -> Report:
    return check_checkpoint(str(tiny_base))


def test_the_published_schema_is_the_programs() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == report_schema()


def test_a_report_holds_every_verdict_and_finding(report: Report) -> None:
    hit = Hit(ENGINES[0], Part.MTP, Harm.REFUSED, "ValueError")
    finding = Finding(
        "D3", Severity.ERROR, "mtp.fc", "gone", "bad", "graft", "x#1", (hit,), "index"
    )
    found = json.loads(report_json(replace(report, findings=(finding,))))
    assert found["schema"] == "nybble.check/1"
    assert not found["clean"]
    assert [verdict["engine"] for verdict in found["verdicts"]] == [one.id for one in ENGINES]
    assert found["findings"] == [
        {
            "code": "D3",
            "severity": "error",
            "where": "mtp.fc",
            "seen": "gone",
            "consequence": "bad",
            "fix": "graft",
            "evidence": "x#1",
            "repair": "index",
            "hits": [
                {"engine": "vllm-0.19", "part": "mtp", "harm": "refused", "raises": "ValueError"}
            ],
        }
    ]


def test_a_report_has_the_keys_of_the_schema(report: Report) -> None:
    schema = json.loads(report_schema())
    found = json.loads(report_json(report))
    assert set(found) == set(schema["properties"])
    verdict = schema["$defs"]["VerdictJson"]
    assert all(set(one) == set(verdict["properties"]) for one in found["verdicts"])
