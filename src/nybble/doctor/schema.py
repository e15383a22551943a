"""The doctor's report as JSON. ``docs/schemas/check.json`` is this model's schema."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from nybble.doctor.check import Report
from nybble.doctor.findings import Finding, Harm, Part, Severity
from nybble.doctor.verdict import Verdict

HarmName = Literal["none", "absent", "refused", "wrong", "random"]


@dataclass(frozen=True)
class HitJson:
    """The harm that a finding does to one part in one engine."""

    engine: str
    part: Part
    harm: HarmName
    raises: str | None


@dataclass(frozen=True)
class FindingJson:
    """One thing that is wrong, or worth knowing."""

    code: str
    severity: Severity
    where: str
    seen: str
    consequence: str
    fix: str
    evidence: str
    repair: str | None
    hits: list[HitJson]


@dataclass(frozen=True)
class OutcomeJson:
    """What becomes of one part in one engine."""

    harm: HarmName
    raises: str | None
    codes: list[str]


@dataclass(frozen=True)
class VerdictJson:
    """What one engine makes of the checkpoint."""

    engine: str
    label: str
    loads: bool
    sentence: str
    parts: dict[Part, OutcomeJson]
    not_analysed: str | None


@dataclass(frozen=True)
class ReportJson:
    """Everything that ``nybble check`` found."""

    checkpoint: str
    base: str | None
    deep: bool
    method: str | None
    clean: bool
    verdicts: list[VerdictJson]
    findings: list[FindingJson]
    schema: Literal["nybble.check/1"] = "nybble.check/1"


_ADAPTER = TypeAdapter(ReportJson)


def report_schema() -> str:
    """The JSON schema of ``report_json``'s text."""
    return json.dumps(_ADAPTER.json_schema(mode="serialization"), indent=2) + "\n"


def report_json(report: Report) -> str:
    """The report, two spaces of indent, one trailing line break."""
    model = ReportJson(
        checkpoint=report.checkpoint,
        base=report.base,
        deep=report.deep,
        method=report.method,
        clean=report.is_clean,
        verdicts=[_verdict(verdict) for verdict in report.verdicts],
        findings=[_finding(finding) for finding in report.findings],
    )
    return _ADAPTER.dump_json(model, indent=2).decode() + "\n"


def _verdict(verdict: Verdict) -> VerdictJson:
    return VerdictJson(
        engine=verdict.engine.id,
        label=verdict.engine.label,
        loads=verdict.loads,
        sentence=verdict.sentence,
        parts={
            part: OutcomeJson(
                harm=_name(outcome.harm), raises=outcome.raises, codes=list(outcome.codes)
            )
            for part, outcome in verdict.outcomes.items()
        },
        not_analysed=verdict.unknown,
    )


def _finding(finding: Finding) -> FindingJson:
    hits = [
        HitJson(engine=hit.engine.id, part=hit.part, harm=_name(hit.harm), raises=hit.raises)
        for hit in finding.hits
    ]
    return FindingJson(
        code=finding.code,
        severity=finding.severity,
        where=finding.where,
        seen=finding.seen,
        consequence=finding.consequence,
        fix=finding.fix,
        evidence=finding.evidence,
        repair=finding.repair,
        hits=hits,
    )


def _name(harm: Harm) -> HarmName:
    return _HARM_NAMES[harm]


_HARM_NAMES: dict[Harm, HarmName] = {
    Harm.NONE: "none",
    Harm.ABSENT: "absent",
    Harm.REFUSED: "refused",
    Harm.WRONG: "wrong",
    Harm.RANDOM: "random",
}
