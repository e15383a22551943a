"""Which of a folder's tensors each engine would load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.sparse_checkpoints import write_index, write_shard, write_sharded

from nybble.doctor.engines import Family
from nybble.doctor.snapshot import Snapshot, take_snapshot
from nybble.doctor.source import LocalSource

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    path = tmp_path / "checkpoint"
    write_sharded(path, [{"b": (2, 2), "a": (3,)}, {"c": (4,)}])
    return path


def snapshot_of(folder: Path) -> Snapshot:
    return take_snapshot(LocalSource(folder))


def loaded(folder: Path, family: Family) -> list[tuple[str, str]]:
    return [(name, info.file.name) for name, info in snapshot_of(folder).loaded_by(family).items()]


def test_a_shard_is_read_whole_and_by_name(folder: Path) -> None:
    write_index(folder, {"b": FIRST, "c": SECOND})  # 'a' is not listed, and still in a listed file
    for family in Family:
        assert loaded(folder, family) == [("a", FIRST), ("b", FIRST), ("c", SECOND)]


def test_a_file_that_is_not_listed_is_not_read(folder: Path) -> None:
    write_shard(folder / "mtp.safetensors", {"mtp.fc.weight": (2,)})
    for family in Family:
        assert "mtp.fc.weight" not in snapshot_of(folder).loaded_by(family)
    assert "mtp.fc.weight" in snapshot_of(folder).all_tensors()


def test_a_lone_file_beside_an_index_hides_the_shards_from_transformers(folder: Path) -> None:
    write_shard(folder / "model.safetensors", {"a": (3,), "z": (1,)})
    listed = [("a", FIRST), ("b", FIRST), ("c", SECOND)]
    assert loaded(folder, Family.VLLM) == loaded(folder, Family.SGLANG) == listed
    lone = [("a", "model.safetensors"), ("z", "model.safetensors")]
    assert loaded(folder, Family.TRANSFORMERS) == lone
    assert snapshot_of(folder).all_tensors()["a"].file.name == FIRST


def test_without_an_index_transformers_reads_only_the_lone_file(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert loaded(folder, Family.VLLM) == [("a", FIRST), ("b", FIRST), ("c", SECOND)]
    assert loaded(folder, Family.TRANSFORMERS) == []


def test_of_a_tensor_in_two_files_the_later_stays(tmp_path: Path) -> None:
    shards = {f"model-{n}.safetensors": {"a": (n,), f"b{n}": (1,)} for n in (2, 10)}
    for name, shapes in shards.items():
        write_shard(tmp_path / name, shapes)
    write_index(tmp_path, {"a": "model-2.safetensors", "b10": "model-10.safetensors"})
    snapshot = snapshot_of(tmp_path)
    shapes = {family: snapshot.loaded_by(family)["a"].shape for family in Family}
    # vLLM sorts files by their numbers, the others by letters.
    assert shapes == {Family.VLLM: (10,), Family.TRANSFORMERS: (2,), Family.SGLANG: (2,)}
    assert snapshot.all_tensors()["a"].shape == (2,)


def test_transformers_sorts_tensors_by_their_numbers(tmp_path: Path) -> None:
    names = ["x.10.w", "x.9.w", "x.w10", "x.w9", "x.w", f"x.{'7' * 5000}.w"]
    write_shard(tmp_path / "model.safetensors", dict.fromkeys(names, (1,)))
    found = snapshot_of(tmp_path)
    expected = ["x.9.w", "x.10.w", f"x.{'7' * 5000}.w", "x.w", "x.w9", "x.w10"]
    assert [*found.loaded_by(Family.TRANSFORMERS)] == expected
    assert [*found.loaded_by(Family.VLLM)] == sorted(names)


def test_mistral_files_are_all_that_vllm_reads(folder: Path) -> None:
    write_shard(folder / "consolidated.safetensors", {"m": (1,)})
    assert loaded(folder, Family.VLLM) == [("m", "consolidated.safetensors")]
    assert ("a", FIRST) in loaded(folder, Family.SGLANG)
    index = {"weight_map": {"m": "another.safetensors"}}
    path = folder / "consolidated.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
    assert loaded(folder, Family.VLLM) == []


def test_sglang_leaves_the_mistral_file_of_a_pair(tmp_path: Path) -> None:
    write_shard(tmp_path / "consolidated.safetensors", {"m": (1,)})
    write_shard(tmp_path / "model.safetensors", {"a": (1,)})
    assert loaded(tmp_path, Family.SGLANG) == [("a", "model.safetensors")]
