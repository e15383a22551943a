"""The doctor finds what is wrong with broken checkpoints, and nothing wrong with sound ones."""

from __future__ import annotations

import pytest
from support.broken_checkpoints import CASES, KINDS, Corpus
from support.good_checkpoints import GOOD

from nybble.demo import bundled_model
from nybble.doctor.check import check_checkpoint
from nybble.doctor.engines import ENGINES
from nybble.doctor.findings import Severity


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with bundled_model() as base:
        return Corpus(base, tmp_path_factory.mktemp("corpus"))


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(GOOD) >= 10
    assert len(KINDS) >= 40
    assert {kind.code for kind in KINDS.values()} == {f"D{number}" for number in range(1, 20)}


@pytest.mark.parametrize("deep", [False, True], ids=["headers", "deep"])
@pytest.mark.parametrize("name", GOOD)
def test_a_sound_checkpoint_has_no_findings_that_matter(
    corpus: Corpus, name: str, deep: bool
) -> None:
    base = str(corpus.good("base")) if deep else None
    engines = tuple(engine for engine in ENGINES if engine.id not in GOOD[name].not_for)
    report = check_checkpoint(str(corpus.good(name)), base=base, engines=engines, deep=deep)
    assert [found for found in report.findings if found.severity is not Severity.NOTE] == []
    assert report.is_clean


@pytest.mark.parametrize("name", [name for name, good in GOOD.items() if good.not_for])
def test_what_one_engine_cannot_read_is_said_of_that_engine_alone(
    corpus: Corpus, name: str
) -> None:
    verdicts = check_checkpoint(str(corpus.good(name))).verdicts
    harmed = [verdict.engine.id for verdict in verdicts if not verdict.is_clean]
    assert harmed == list(GOOD[name].not_for)


@pytest.mark.parametrize("case", CASES)
def test_a_broken_checkpoint_is_flagged_by_the_right_check(corpus: Corpus, case: str) -> None:
    kind, _ = CASES[case]
    report = check_checkpoint(
        str(corpus.broken(case)),
        base=str(corpus.good("base")) if kind.with_base else None,
        tensor_parallel=kind.tensor_parallel,
        deep=kind.deep,
    )
    found = [found for found in report.findings if found.code == kind.code]
    assert found, [(other.code, other.where, other.seen) for other in report.findings]
    assert any(each.severity is not Severity.NOTE for each in found) or kind.is_note, found


@pytest.mark.parametrize("case", [case for case, (kind, _) in CASES.items() if kind.deep])
def test_what_only_values_show_is_not_guessed_from_headers(corpus: Corpus, case: str) -> None:
    kind, start = CASES[case]
    report = check_checkpoint(str(corpus.broken(case)))
    sound = check_checkpoint(str(corpus.good(start)))
    assert report.findings == sound.findings, kind.name
