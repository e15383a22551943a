"""Broken checkpoints of the bundled model, repaired: as good as those that were never broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.broken_checkpoints import CASES, KINDS, Corpus
from support.checkpoints import read_json, read_weights
from support.commands import Outcome, refusal, snapshot
from support.packed import dense
from support.repairs import bytes_of, stored_bytes
from support.web_server import serving

import nybble as package
from nybble.core.errors import CheckpointError, OutputError
from nybble.doctor.check import check_checkpoint
from nybble.doctor.findings import Severity
from nybble.doctor.repair.run import repair

BASE = Path(package.__file__).parent / "assets" / "tiny"
Run = Callable[..., Outcome]

MENDED_ALONE = (
    "mtp-shard-not-in-the-index",
    "stale-shard",
    "lone-file-beside-the-index",
    "index-names-the-wrong-shard",
    "index-lists-a-ghost",
    "index-leaves-the-folder",
    "index-cut-off",
    "index-total-wrong",
    "declaration-missing",
    "method-unknown",
    "packing-of-another-name",
    "bits-undeclared",
    "desc-act-undeclared",
    "bits-misdeclared",
    "group-size-misdeclared",
    "mtp-rule-missing",
    "mtp-listed-as-quantized",
    "quantized-declared-dense",
    "vision-rule-missing",
    "in-proj-rule-missing",
    "head-declared-quantized",
    "bare-prefix-ignored",
    "escaped-prefix",
    "entry-without-bits",
    "block-list-of-the-text-model",
    "module-list-hits-the-tower",
    "module-list-missing",
    "two-declarations",
    "group-order-declared",
    "status-frozen",
    "format-of-activations",
    "mtp-head-undeclared",
    "mtp-under-another-name",
    "head-tied-at-one-level",
    "weight-left-beside-codes",
    "zeros-of-version-2",
)
"""Kinds of damage that leave no trace, whether the base is at hand or not."""
MENDED_WITH_BASE = (
    "config-missing",
    "config-cut-off",
    "mtp-shard-missing",
    "mtp-shard-cut-off",
    "mtp-dropped",
    "mtp-fc-missing",
    "mtp-norm-missing",
    "mtp-fc-missing-from-the-base",
    "mtp-fc-transposed",
    "mtp-in-float16",
    "mtp-fc-packed",
    "mtp-layer-packed",
    "vision-dropped",
    "vision-config-missing",
    "layer-types-of-another-model",
    "processor-missing",
    "tokenizer-missing",
    "norm-missing",
    "head-missing",
    "head-of-fewer-tokens",
    "head-dropped-as-if-tied",
    "kept-tensors-recast",
)
DEQUANTIZED = ("mtp-fc-packed", "mtp-layer-packed")
LOST = (
    "trunk-shard-missing",
    "shard-cut-off",
    "codes-missing",
    "fused-group-split",
    "fused-group-of-two-widths",
    "activation-order",
)
"""Kinds that nothing but a new download or another quantization mends."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(BASE, tmp_path_factory.mktemp("corpus"))


def first_case(kind: str) -> str:
    """In one format each, by turns, so that all are met."""
    starts = KINDS[kind].starts
    return f"{kind}-{starts[sum(kind.encode()) % len(starts)]}"


def loudest(folder: Path, base: Path | None = None) -> list[str]:
    """Codes of all that is worse than a note, values included."""
    report = check_checkpoint(str(folder), base=str(base) if base else None, deep=True)
    return [found.code for found in report.findings if found.severity is not Severity.NOTE]


@pytest.mark.parametrize("kind", MENDED_ALONE)
def test_a_mended_checkpoint_is_as_good_as_new(corpus: Corpus, tmp_path: Path, kind: str) -> None:
    case = first_case(kind)
    broken, good = corpus.broken(case), corpus.good(CASES[case][1])
    before = snapshot(broken)
    report = repair(broken, tmp_path / "out")
    assert snapshot(broken) == before
    assert report.is_clean
    assert report.remaining == ()
    assert report.done
    assert loudest(tmp_path / "out") == []
    assert stored_bytes(tmp_path / "out") == stored_bytes(good)
    assert read_json(tmp_path / "out" / "config.json") == read_json(good / "config.json")


@pytest.mark.parametrize("kind", MENDED_WITH_BASE)
def test_what_is_lost_comes_from_the_base_bit_for_bit(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    case = first_case(kind)
    broken, good = corpus.broken(case), corpus.good(CASES[case][1])
    report = repair(broken, tmp_path / "out", str(BASE))
    assert report.is_clean
    assert loudest(tmp_path / "out", BASE) == []
    assert stored_bytes(tmp_path / "out") == stored_bytes(good)
    assert read_json(tmp_path / "out" / "config.json") == read_json(good / "config.json")


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith(DEQUANTIZED)])
def test_a_packed_head_without_a_base_means_the_same_in_bf16(
    corpus: Corpus, tmp_path: Path, case: str
) -> None:
    broken = corpus.broken(case)
    report = repair(broken, tmp_path / "out")
    assert report.is_clean
    assert loudest(tmp_path / "out") == []
    packed, found = read_weights(broken), read_weights(tmp_path / "out")
    assert report.changes.tensors_added
    for name in report.changes.tensors_added:
        expected = dense(packed, name.removesuffix(".weight")).to(torch.bfloat16)
        assert bytes_of(found[name]) == bytes_of(expected)
    assert {n for n in found if n.startswith("mtp.")} == {
        n for n in read_weights(BASE) if n.startswith("mtp.")
    }


@pytest.mark.parametrize("kind", LOST)
def test_what_cannot_be_mended_is_told_and_not_written(
    corpus: Corpus, tmp_path: Path, kind: str
) -> None:
    broken = corpus.broken(first_case(kind))
    report = repair(broken, tmp_path / "out", str(BASE))
    assert report.out is None
    assert not report.is_clean
    assert report.unmended
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", ["base", "gptq-w4", "compressed-tensors-mtp4", "auto_round-mtp4"])
def test_a_sound_checkpoint_needs_nothing(corpus: Corpus, tmp_path: Path, good: str) -> None:
    report = repair(corpus.good(good), tmp_path / "out", str(BASE))
    assert (report.out, report.is_clean, report.unmended) == (None, True, ())
    assert list(tmp_path.iterdir()) == []


def test_in_place(corpus: Corpus, tmp_path: Path, nybble: Run) -> None:
    good = corpus.good("gptq-w4")
    folder = tmp_path / "model"
    corpus.broken("mtp-dropped-gptq-w4").rename(folder)
    (folder / ".gitattributes").write_text("kept")
    outcome = nybble("repair", folder, "--base", BASE, "--in-place")
    assert outcome.code == 0, outcome
    assert stored_bytes(folder) == stored_bytes(good)
    assert (folder / ".gitattributes").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_report_says_what_was_changed(corpus: Corpus, tmp_path: Path, nybble: Run) -> None:
    broken = corpus.broken("mtp-layer-packed-auto_round-w4")
    out, file = tmp_path / "out", tmp_path / "report.json"
    outcome = nybble("repair", broken, "--base", BASE, "-o", out, "--json", file)
    assert outcome.code == 0, outcome
    text = re.sub(r"\s+", " ", outcome.out)
    assert "graft-mtp" in text
    assert "15 tensors copied from" in text
    assert "check is content" in text
    report = json.loads(file.read_text())
    assert report["clean"] is True
    assert report["out"] == str(out)
    changes = report["changes"]
    assert "mtp.layers.0.mlp.down_proj.qweight" in changes["tensors_dropped"]
    assert "mtp.layers.0.mlp.down_proj.weight" in changes["tensors_added"]
    assert "mtp.fc.weight" in changes["tensors_replaced"]
    assert changes["files_left_out"] == ["nybble.json"]


def test_what_is_left_is_shown_with_exit_code_1(
    corpus: Corpus, tmp_path: Path, nybble: Run
) -> None:
    outcome = nybble("repair", corpus.broken("mtp-dropped-gptq-w4"), "-o", tmp_path / "out")
    assert outcome.code == 1, outcome
    assert "--base" in outcome.out
    assert "D3 error" in outcome.out
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(corpus: Corpus, tmp_path: Path, nybble: Run) -> None:
    broken = corpus.broken("mtp-rule-missing-gptq-w4")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    assert "exists already" in refusal(nybble("repair", broken, "-o", tmp_path / "used"))
    assert "within the checkpoint" in refusal(nybble("repair", broken, "-o", broken / "out"))
    both = nybble("repair", broken, "-o", tmp_path / "out", "--in-place")
    assert "--in-place" in refusal(both)
    assert "no folder" in refusal(nybble("repair", tmp_path / "nothing"))
    assert "config.json is missing" in refusal(
        nybble("repair", corpus.broken("config-missing-auto_round-w4"), "-o", tmp_path / "out")
    )


def test_a_failure_in_the_middle_changes_nothing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = corpus.broken("mtp-fc-packed-gptq-w4")
    before = snapshot(broken)
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("nybble.doctor.repair.write._verify", fail)
    for values in ({"out": tmp_path / "out"}, {"in_place": True}):
        with pytest.raises(KeyboardInterrupt):
            repair(broken, base=str(BASE), **values)
        assert snapshot(broken) == before
        assert list(tmp_path.iterdir()) == []
        assert not broken.with_name(f"{broken.name}.partial").exists()
    assert len(calls) == 2


def test_the_default_folder_stands_beside(corpus: Corpus) -> None:
    broken = corpus.broken("bits-misdeclared-gptq-w4")
    report = repair(broken)
    assert report.out == f"{broken}-repaired"
    with pytest.raises(OutputError, match="exists already"):
        repair(broken)


def test_a_base_that_is_none_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        repair(corpus.broken("mtp-dropped-gptq-w4"), tmp_path / "out", str(tmp_path))


def test_of_a_base_far_away_only_the_head_is_fetched(corpus: Corpus, tmp_path: Path) -> None:
    broken, good = corpus.broken("mtp-dropped-auto_round-w4"), corpus.good("auto_round-w4")
    head = sum(t.nbytes for name, t in read_weights(BASE).items() if name.startswith("mtp."))
    with serving(BASE) as server:
        report = repair(broken, tmp_path / "out", server.url)
    assert report.is_clean
    assert stored_bytes(tmp_path / "out") == stored_bytes(good)
    assert head < server.sent < head + (BASE / "model.safetensors").stat().st_size / 4
