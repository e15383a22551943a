from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.commands import snapshot

from nybble.core.errors import OutputError
from nybble.pipeline.output import is_finished


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
