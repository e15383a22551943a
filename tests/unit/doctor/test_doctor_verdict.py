from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from nybble.doctor.case import Case
from nybble.doctor.check import open_case
from nybble.doctor.engines import ENGINES, Engine
from nybble.doctor.findings import Finding, Harm, Hit, Part, Severity
from nybble.doctor.snapshot import take_snapshot
from nybble.doctor.source import open_source
from nybble.doctor.verdict import Verdict, verdicts

OLD, *_, NEW, TRANSFORMERS, SGLANG = ENGINES


@pytest.fixture
def case(tiny_base: Path) -> Case:
    return open_case(take_snapshot(open_source(str(tiny_base))))


def found(code: str, *hits: Hit) -> Finding:
    return Finding(code, Severity.ERROR, "where", "seen", "consequence", "fix", hits=hits)


def of(engine: Engine, case: Case, findings: Iterable[Finding]) -> Verdict:
    return next(one for one in verdicts(case, findings) if one.engine == engine)


def test_without_findings_all_works(case: Case) -> None:
    assert of(NEW, case, []).sentence == "loads; MTP works; vision works"
    assert of(NEW, case, []).is_clean


def test_transformers_has_no_use_for_the_head(case: Case) -> None:
    finding = found("D3", *(Hit(engine, Part.MTP, Harm.RANDOM) for engine in ENGINES))
    assert of(TRANSFORMERS, case, [finding]).sentence == "loads; vision works"
    assert not of(SGLANG, case, [finding]).is_clean


def test_a_finding_counts_where_it_hits(case: Case) -> None:
    finding = found(
        "D4", Hit(OLD, Part.MTP, Harm.RANDOM), Hit(NEW, Part.MTP, Harm.REFUSED, "ValueError")
    )
    assert of(OLD, case, [finding]).sentence == (
        "loads; MTP: random weights, 0 % of drafts accepted, in silence (D4); vision works"
    )
    assert of(NEW, case, [finding]).sentence == (
        "loads; with MTP on it does not start: ValueError (D4); vision works"
    )
    assert of(SGLANG, case, [finding]).is_clean


def test_who_refuses_a_part_never_computes_with_it(case: Case) -> None:
    findings = [
        found("D6", Hit(NEW, Part.TRUNK, Harm.RANDOM)),
        found("D1", Hit(NEW, Part.TRUNK, Harm.REFUSED)),
        found("D8", Hit(NEW, Part.TRUNK, Harm.REFUSED, "KeyError")),
    ]
    verdict = of(NEW, case, findings)
    assert verdict.sentence == "does not load: KeyError (D1, D8)"
    assert not verdict.loads


def test_an_architecture_without_rules_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    unknown = open_case(take_snapshot(open_source(str(tmp_path))))
    verdict = of(NEW, unknown, [])
    assert verdict.sentence == ("not analysed: its architecture is not one that nybble knows")
