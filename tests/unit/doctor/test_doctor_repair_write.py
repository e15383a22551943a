"""A draft on disk: whole or not at all, and no byte moved that need not be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from support.checkpoints import Tiny, read_json, read_weights, write_json, write_tiny
from support.commands import snapshot
from support.repairs import mend, patient, stored_bytes, write

from nybble.checkpoint.index import open_index
from nybble.checkpoint.staging import replaced_folder
from nybble.core.errors import CheckpointError, OutputError
from nybble.doctor.repair.report import changes
from nybble.doctor.repair.write import write_draft
from nybble.doctor.source import LocalSource

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "base")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The base in three files, of which the index forgot the second; and odd things beside."""
    folder = write_tiny(tmp_path / "sharded", Tiny(shards=3))
    index = read_json(folder / INDEX)
    kept = {name: file for name, file in index["weight_map"].items() if file != SECOND}
    write_json(folder / INDEX, {**index, "weight_map": kept})
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.png").write_bytes(b"picture")
    os.mkfifo(folder / "pipe")
    return folder


def test_files_that_did_not_change_are_the_same_byte_for_byte(
    sharded: Path, tmp_path: Path
) -> None:
    before = snapshot(sharded)
    out = write(mend(sharded), sharded, tmp_path / "out")
    assert snapshot(sharded) == before
    for name in ("config.json", "tokenizer.json", "README.md", "LICENSE", "assets/picture.png"):
        assert (out / name).read_bytes() == (sharded / name).read_bytes(), name
    for file in sharded.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
        assert (out / file.name).stat().st_ino != file.stat().st_ino
    index = read_json(out / INDEX)
    assert index["weight_map"] == {
        name: file.name for file in sharded.glob("*.safetensors") for name in load_file(file)
    }
    assert index["metadata"]["total_size"] == open_index(out).total_bytes
    left = {"pytorch_model.bin", ".git", "pipe"}
    assert {p.name for p in out.iterdir()} == {p.name for p in sharded.iterdir()} - left


def test_a_head_beside_one_file_gets_an_index_that_loaders_ask(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lost"
    shutil.copytree(base, folder)
    head = {name for name in read_weights(base) if name.startswith("mtp.")}
    write_tiny(tmp_path / "headless", Tiny(mtp=False))
    shutil.copy(tmp_path / "headless" / "model.safetensors", folder)
    draft = mend(folder, "graft-mtp", base=base)
    out = write(draft, folder, tmp_path / "out")
    files = ["model-00001-of-00001.safetensors", "mtp.safetensors"]
    assert sorted(file.name for file in out.glob("*.safetensors")) == files
    assert set(load_file(out / files[1])) == head
    assert read_weights(out).keys() == read_weights(base).keys()
    assert (out / files[0]).read_bytes() == (folder / "model.safetensors").read_bytes()
    changed = changes(patient(folder, base), draft, folder)
    assert set(changed.tensors_added) == head
    assert changed.files_left_out == ()


def test_a_result_of_one_file_needs_no_index(base: Path, tmp_path: Path) -> None:
    write_json(base / INDEX, {"weight_map": {"lm_head.weight": "model-00001.safetensors"}})
    (base / "zzz.safetensors").write_bytes(b"broken")
    draft = mend(base)
    out = write(draft, base, tmp_path / "out")
    assert not (out / INDEX).exists()
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert stored_bytes(out) == read_bytes(base)
    assert changes(patient(base), draft, base).files_left_out == ("zzz.safetensors",)


def read_bytes(folder: Path) -> object:
    (folder / "zzz.safetensors").unlink(missing_ok=True)
    found = stored_bytes(folder)
    (folder / "zzz.safetensors").write_bytes(b"broken")
    return found


def test_links_are_followed(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in base.iterdir():
        (cache / file.name).symlink_to(file)
    out = write(mend(cache), cache, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert stored_bytes(out) == stored_bytes(base)


def test_in_place_moves_no_byte_that_stays(sharded: Path) -> None:
    inodes = {file.name: file.stat().st_ino for file in sharded.glob("*.safetensors")}
    draft, weights = mend(sharded), stored_bytes(sharded)
    with replaced_folder(sharded) as staging:
        write_draft(draft, patient(sharded).snapshot, sharded, staging, is_in_place=True)
    assert {file.name: file.stat().st_ino for file in sharded.glob("*.safetensors")} == inodes
    assert stored_bytes(sharded) == weights
    assert len(open_index(sharded).tensors) == len(weights)
    assert (sharded / ".git" / "HEAD").read_text() == "ref"
    assert (sharded / "assets" / "picture.png").read_bytes() == b"picture"
    assert [path.name for path in sharded.parent.iterdir()] == ["sharded"]


def test_a_failure_in_the_middle_leaves_nothing_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "headless", Tiny(mtp=False))
    config = read_json(base / "config.json")
    write_json(folder / "config.json", config)
    draft = mend(folder, "graft-mtp", base=base)
    before, read = snapshot(tmp_path), LocalSource.read

    def fail(self: LocalSource, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if start > 0:
            raise CheckpointError("the disk broke")
        return read(self, name, start, stop)

    monkeypatch.setattr(LocalSource, "read", fail)
    with pytest.raises(CheckpointError, match="the disk broke"):
        write(draft, folder, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_base_that_changes_meanwhile_is_noticed(base: Path, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "headless", Tiny(mtp=False))
    write_json(folder / "config.json", read_json(base / "config.json"))
    draft = mend(folder, "graft-mtp", base=base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="ends within"):
        write(draft, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = mend(sharded)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="make room"):
        write(draft, sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_nybble_said_of_the_weights_is_left_out(base: Path, tmp_path: Path) -> None:
    (base / "nybble.json").write_text("{}")
    draft = mend(base)
    out = write(draft, base, tmp_path / "out")
    assert not (out / "nybble.json").exists()
    assert changes(patient(base), draft, base).files_left_out == ("nybble.json",)
