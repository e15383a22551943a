from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import snapshot

from nybble.core.errors import OutputError
from nybble.pipeline.output import is_finished, staged_folder


def finished(out: Path, job: str) -> Path:
    out.mkdir()
    (out / "nybble.json").write_text(json.dumps({"job": job}), encoding="utf-8")
    save_file({"t": torch.zeros(1)}, out / "model.safetensors")
    return out


def test_nothing_and_an_empty_folder_are_free(tmp_path: Path) -> None:
    assert not is_finished(tmp_path / "nothing", "job")
    (tmp_path / "empty").mkdir()
    assert not is_finished(tmp_path / "empty", "job")


def test_the_same_job_is_finished(tmp_path: Path) -> None:
    assert is_finished(finished(tmp_path / "out", "job"), "job")


def test_another_job_is_refused(tmp_path: Path) -> None:
    out = finished(tmp_path / "out", "another")
    with pytest.raises(OutputError, match="another recipe, base or calibration text"):
        is_finished(out, "job")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        is_finished(tmp_path / "out", "job")


@pytest.mark.parametrize("manifest", [None, "", "{}", "[]", "3", '{"job"', "\xff"])
def test_a_foreign_folder_is_refused(tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "nybble.json").write_text(manifest, encoding="latin-1")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="holds no result of nybble"):
        is_finished(tmp_path, "job")
    assert snapshot(tmp_path) == before


def test_a_name_that_the_disk_refuses_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        is_finished(tmp_path / ("x" * 300), "job")


def test_a_staged_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with staged_folder(out) as staging:
        (staging / "weights").write_text("w")
        assert staging.parent == out.parent
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "w"


def test_a_staged_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as staging:
        (staging / "weights").write_text("w")
    assert (tmp_path / "out" / "weights").read_text() == "w"


@pytest.mark.parametrize("error", [OutputError("full"), KeyboardInterrupt(), MemoryError()])
def test_a_staged_folder_vanishes_on_any_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged_folder(tmp_path / "out") as staging:
        (staging / "weights").write_text("w")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model.safetensors.partial").write_text("half")
    with staged_folder(tmp_path / "out") as staging:
        assert list(staging.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="cannot move"), staged_folder(out) as staging:
        (staging / "weights").write_text("w")
        finished(out, "of another process")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "nybble.json"]


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot create"), staged_folder(tmp_path / "file" / "x"):
        pass


def test_the_current_folder_can_be_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is refused in one line: but its path has no name to put .partial behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    try:
        with staged_folder(Path()) as staging:
            (staging / "weights").write_text("w")
    except OutputError:
        assert list((tmp_path / "here").iterdir()) == []
    else:
        assert (tmp_path / "here" / "weights").read_text() == "w"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
