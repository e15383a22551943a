from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import OutputError


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_file_appears_with_nothing_beside_it(tmp_path: Path) -> None:
    write_bytes_atomic(tmp_path / "config.json", b"\x00new")
    assert content(tmp_path) == {"config.json": b"\x00new"}


def test_an_old_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"old and longer")
    write_bytes_atomic(tmp_path / "config.json", b"new")
    assert content(tmp_path) == {"config.json": b"new"}


def test_what_another_run_left_half_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").write_bytes(b"half")
    write_bytes_atomic(tmp_path / "config.json", b"new")
    assert content(tmp_path) == {"config.json": b"new"}


def test_files_whose_names_differ_in_the_suffix_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_bytes(b"kept")
    write_bytes_atomic(tmp_path / "model.txt", b"new")
    assert content(tmp_path) == {"model.json": b"kept", "model.txt": b"new"}


def test_a_missing_folder(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "config.json"
    with pytest.raises(OutputError) as caught:
        write_bytes_atomic(target, b"new")
    assert str(caught.value) == f"cannot write {target}: No such file or directory"
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(OutputError, match="Not a directory"):
        write_bytes_atomic(tmp_path / "file" / "config.json", b"new")
    assert content(tmp_path) == {"file": b"kept"}


def test_a_folder_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(OutputError, match=r"config\.json: Is a directory"):
        write_bytes_atomic(tmp_path / "config.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "config.json").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match="No space left on device"):
        write_bytes_atomic(tmp_path / "config.json", b"new")
    assert content(tmp_path) == {"config.json": b"old"}


def test_data_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bytes | None]] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        target = tmp_path / "config.json"
        seen = target.read_bytes() if target.exists() else None
        synced.append((os.fstat(descriptor).st_ino, seen))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_bytes_atomic(tmp_path / "config.json", b"new")
    file_inode, folder_inode = (tmp_path / "config.json").stat().st_ino, tmp_path.stat().st_ino
    assert synced == [(file_inode, None), (folder_inode, b"new")]
