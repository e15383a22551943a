"""Folders as sources, and what a user may call a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.commands import run_python

from nybble.core.errors import CheckpointError
from nybble.doctor.source import LocalSource, Unreachable, is_plain_name, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_bytes(b"0123456789")
    return path


def test_a_folder_lists_its_files(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "blob").write_bytes(b"four")
    (folder / "link.safetensors").symlink_to(folder / "blob")
    (folder / "nowhere.safetensors").symlink_to(folder / "missing")
    (folder / "two\nlines").write_bytes(b"x")

    source = open_source(str(folder))

    assert dict(source.sizes()) == {"blob": 4, "config.json": 10, "link.safetensors": 4}
    assert source.read("link.safetensors") == b"four"
    assert source.label == str(folder)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, None, b"0123456789"), (3, 5, b"34"), (8, 20, b"89"), (10, 20, b""), (30, 40, b"")],
)
def test_a_range_ends_where_the_file_does(
    folder: Path, start: int, stop: int | None, expected: bytes
) -> None:
    assert LocalSource(folder).read("config.json", start, stop) == expected


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "..", "", "a\0b", "sub/x"])
def test_nothing_outside_the_folder_is_read(folder: Path, name: str) -> None:
    assert not is_plain_name(name)
    with pytest.raises(CheckpointError, match="is no file of"):
        LocalSource(folder).read(name)


def test_a_pipe_is_refused_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")
    source = LocalSource(folder)
    assert source.sizes()["model.safetensors"] == 0
    with pytest.raises(CheckpointError, match="not a regular file"):
        source.read("model.safetensors", 0, 8)


def test_a_folder_that_is_gone_is_unreachable(folder: Path) -> None:
    source = open_source(str(folder))
    (folder / "config.json").unlink()
    folder.rmdir()
    with pytest.raises(Unreachable, match="cannot open"):
        source.sizes()


@pytest.mark.parametrize(
    "where",
    [
        *("", "nowhere", "/no/such/folder", "./no/such", "a/b/c", "../x", "a b/c", "x" * 5000),
        *("nul\0", "hf:", "hf:a/b/c", "hf:a/b@", "https://", "http://[::1", "http://host:port/x"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(where: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(where)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder; give that of the checkpoint"):
        open_source(str(folder / "config.json"))


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        open_source(str(folder), "v1")


def test_a_folder_needs_neither_the_hub_nor_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from nybble.doctor.snapshot import take_snapshot\n"
        "from nybble.doctor.source import open_source\n"
        f"take_snapshot(open_source({str(folder)!r}))\n"
        "print({'torch', 'transformers', 'huggingface_hub', 'httpx2'} & set(sys.modules))"
    )
    outcome = run_python(["-c", program])
    assert outcome.out.strip() == "set()", outcome.err
