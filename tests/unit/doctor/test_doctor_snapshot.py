"""Snapshots of folders: what is read, what becomes a problem, what is never read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import run_python
from support.sparse_checkpoints import write_index, write_shard, write_sharded

from nybble.core.errors import CheckpointError
from nybble.doctor.engines import Family
from nybble.doctor.snapshot import OBJECT_NAMES, ProblemKind, Snapshot, take_snapshot
from nybble.doctor.source import LocalSource

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    path = tmp_path / "checkpoint"
    write_sharded(path, [{"b": (2, 2), "a": (3,)}, {"c": (4,)}])
    return path


def snapshot_of(folder: Path) -> Snapshot:
    return take_snapshot(LocalSource(folder))


def problems_of(folder: Path) -> list[tuple[ProblemKind, str]]:
    return [(problem.kind, problem.file) for problem in snapshot_of(folder).problems]


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_sound_checkpoint(folder: Path) -> None:
    write(folder / "quantize_config.json", {"bits": 4})
    write(folder / "tokenizer.json", {"not": "read"})
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=22)

    snapshot = snapshot_of(folder)

    assert snapshot.problems == ()
    assert snapshot.config == {"model_type": "qwen3_5"}
    assert snapshot.weight_map == {"a": FIRST, "b": FIRST, "c": SECOND}
    assert snapshot.total_size == 22
    assert snapshot.objects["quantize_config.json"] == {"bits": 4}
    assert set(snapshot.objects) <= set(OBJECT_NAMES)
    assert [*snapshot.headers] == [FIRST, SECOND]
    assert [*snapshot.headers[FIRST]] == ["b", "a"]
    info = snapshot.headers[SECOND]["c"]
    assert (info.dtype, info.shape, info.nbytes) == ("BF16", (4,), 8)
    assert snapshot.source.read(info.file.name, info.start, info.stop) == bytes(8)


def test_neither_index_nor_config_is_needed(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": (2,)})
    snapshot = snapshot_of(tmp_path)
    assert (snapshot.config, snapshot.weight_map, snapshot.total_size) == (None, None, None)
    assert not snapshot.problems
    assert [*snapshot.all_tensors()] == ["a"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no checkpoint, neither config.json nor a"),
        (("tokenizer.json", INDEX), "no checkpoint, neither"),
        (("pytorch_model.bin",), r"only pickle weights \(pytorch_model.bin\)"),
        (("._model.safetensors",), "no checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        snapshot_of(tmp_path)


# Broken JSON


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (CONFIG, ProblemKind.UNREADABLE_CONFIG),
        (INDEX, ProblemKind.UNREADABLE_INDEX),
        ("nybble.json", ProblemKind.UNREADABLE_JSON),
    ],
)
@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_broken_json_is_a_problem(folder: Path, name: str, kind: ProblemKind, text: bytes) -> None:
    (folder / name).write_bytes(text)
    snapshot = snapshot_of(folder)
    (found,) = snapshot.problems
    assert (found.kind, found.file) == (kind, name)
    assert "\n" not in found.message
    assert len(found.message) < 300
    assert name not in snapshot.objects
    assert len(snapshot.headers) == 2


@pytest.mark.parametrize("value", [None, 5, [], "x", {"a": 5}, {"a": None}, {"a": "\ud800"}])
def test_a_weight_map_that_is_none(folder: Path, value: object) -> None:
    write(folder / INDEX, {"weight_map": value})
    snapshot = snapshot_of(folder)
    assert snapshot.weight_map is None
    assert [problem.kind for problem in snapshot.problems] == [ProblemKind.UNREADABLE_INDEX]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *((22, 22), (22.0, 22), ("22", None), (True, None), (-1, None), (1.5, None)),
        *((10**30, None), (float("inf"), None), (float("nan"), None), (None, None), ([], None)),
    ],
)
def test_a_total_size_is_a_count_or_nothing(
    folder: Path, size: object, expected: int | None
) -> None:
    write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": {"a": FIRST}})
    assert snapshot_of(folder).total_size == expected


def test_an_index_without_metadata(folder: Path) -> None:
    for metadata in ([], None, 5):
        write(folder / INDEX, {"metadata": metadata, "weight_map": {"a": FIRST}})
        assert snapshot_of(folder).total_size is None


def test_an_index_can_be_empty(folder: Path) -> None:
    write_index(folder, {})
    snapshot = snapshot_of(folder)
    assert snapshot.weight_map == {}
    assert not snapshot.loaded_by(Family.VLLM)


# Names in the index


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "C:\\x.safetensors"),
        *("", ".", "..", "a\0b", "a\nb.safetensors", "x" * 300),
    ],
)
def test_a_name_that_leaves_the_folder_is_not_opened(folder: Path, name: str) -> None:
    write_shard(folder.parent / "x.safetensors", {"secret": (2,)})
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "secret": name})
    snapshot = snapshot_of(folder)
    (found,) = snapshot.problems
    assert (found.kind, found.file) == (ProblemKind.UNSAFE_NAME, name)
    assert found.message.isprintable()
    assert "secret" not in snapshot.all_tensors()


def test_a_file_that_is_not_there(folder: Path) -> None:
    (folder / FIRST).unlink()
    assert problems_of(folder) == [(ProblemKind.MISSING_FILE, FIRST)]
    assert [*snapshot_of(folder).all_tensors()] == ["c"]


def test_a_link_to_nowhere_is_not_there(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(folder / "gone")
    assert problems_of(folder) == [(ProblemKind.MISSING_FILE, FIRST)]


def test_a_listed_file_that_is_no_safetensors(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    write_index(folder, {"a": "pytorch_model.bin"})
    assert problems_of(folder) == [(ProblemKind.BROKEN_HEADER, "pytorch_model.bin")]


def test_very_many_missing_files_are_not_all_told(folder: Path) -> None:
    write_index(folder, {f"t{n}": f"{n}.safetensors" for n in range(5000)})
    found = snapshot_of(folder).problems
    assert len(found) == 100
    assert found[0].message.endswith("which is not there (one of 5000 such files)")


# Broken safetensors files


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


BROKEN = {
    "empty": (b"", "too short"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "pickle": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n", "not a safetensors file"),
    "cut header": (header(b'{"a":', 500), "truncated within the header"),
    "no JSON": (header(b"[1, 2"), "not valid JSON"),
    "cut body": (
        header(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}') + b"xyz",
        "truncated, 1 of",
    ),
    "huge claim": (header(b"{}", 90 * 2**20), "is not read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_problem(folder: Path, name: str) -> None:
    data, message = BROKEN[name]
    (folder / SECOND).write_bytes(data)
    snapshot = snapshot_of(folder)
    (found,) = snapshot.problems
    assert (found.kind, found.file) == (ProblemKind.BROKEN_HEADER, SECOND)
    assert message in found.message
    assert [*snapshot.headers] == [FIRST]


def test_a_truncated_shard(folder: Path) -> None:
    truncate(folder / SECOND, (folder / SECOND).stat().st_size - 3)
    assert problems_of(folder) == [(ProblemKind.BROKEN_HEADER, SECOND)]


def test_pipes_are_problems_and_block_nothing(folder: Path) -> None:
    for name in (CONFIG, FIRST):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert problems_of(folder) == [
        (ProblemKind.UNREADABLE_CONFIG, CONFIG),
        (ProblemKind.BROKEN_HEADER, FIRST),
    ]


def test_a_folder_is_no_file(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    (folder / "extra.safetensors").mkdir()
    assert snapshot_of(folder).config is None
    assert not problems_of(folder)


def test_a_header_of_many_tensors_is_read_whole(folder: Path) -> None:
    shapes = {f"model.layers.{n}.{'x' * 100}": (2,) for n in range(3000)}
    write_shard(folder / "extra.safetensors", shapes)
    assert (folder / "extra.safetensors").stat().st_size > 2**19
    assert len(snapshot_of(folder).headers["extra.safetensors"]) == 3000


# Limits


def test_1200_tensors_in_18_shards_take_no_time(tmp_path: Path) -> None:
    name = "model.language_model.layers.{}.{}.weight"
    write_sharded(
        tmp_path,
        [{name.format(n, i): (5120, 5120) for i in range(68)} for n in range(18)],
    )
    started = time.process_time()
    snapshot = snapshot_of(tmp_path)
    found = len(snapshot.loaded_by(Family.VLLM))
    assert time.process_time() - started < 0.2
    assert found == len(snapshot.all_tensors()) == 18 * 68
    assert sum(snapshot.sizes.values()) > 60e9


JUNK: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b'{"a":[' + b"[],{}," * 5_000_000 + b"0]}",
    "numbers": lambda: b'{"a":[' + b"1000," * 6_000_000 + b"0]}",
    "keys": lambda: b"{" + b",".join(b'"%d":1' % n for n in range(1_500_000)) + b"}",
    "wide letter": lambda: '{"\U0001f600":"'.encode() + b"a" * 30_000_000 + b'"}',
    "wide escape": lambda: rb'{"a":"\ud83d\ude00' + b"a" * 30_000_000 + b'"}',
}


def test_junk_of_30_mb_does_not_fill_the_memory(tmp_path: Path) -> None:
    for name, make in JUNK.items():
        text = make()
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_bytes(text)
        (tmp_path / name / "model.safetensors").write_bytes(header(text))
    program = (
        "from pathlib import Path\n"
        "from nybble.doctor.snapshot import take_snapshot\n"
        "from nybble.doctor.source import LocalSource\n"
        f"for folder in Path({str(tmp_path)!r}).iterdir():\n"
        "    assert len(take_snapshot(LocalSource(folder)).problems) == 2\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    outcome = run_python(["-c", program])
    assert outcome.code == 0, outcome.err
    assert int(outcome.out) < 200 * 1024  # kB


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FILE_NAMES = st.sampled_from([FIRST, SECOND, "../x.safetensors", "", "\ud800", "b.bin"]) | st.text()
INDEXES = st.fixed_dictionaries(
    {}, optional={"weight_map": st.dictionaries(st.text(), FILE_NAMES) | JSON, "metadata": JSON}
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "I32", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
    },
)
HEADERS = st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES | JSON, max_size=3)
BYTES = st.binary(max_size=60)


def as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def as_shard(value: Any, body: int, shift: int) -> bytes:
    if isinstance(value, bytes):
        return value
    text = as_bytes(value)
    return header(text, max(len(text) + shift, 0)) + bytes(body)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    config=JSON | BYTES,
    index=INDEXES | JSON | BYTES,
    shard=st.builds(as_shard, HEADERS | BYTES, st.integers(0, 40), st.integers(-2, 2)),
    extra=JSON | BYTES,
)
def test_whatever_the_files_hold_a_snapshot_is_taken(
    tmp_path: Path, config: Any, index: Any, shard: bytes, extra: Any
) -> None:
    (tmp_path / CONFIG).write_bytes(as_bytes(config))
    (tmp_path / INDEX).write_bytes(as_bytes(index))
    (tmp_path / FIRST).write_bytes(shard)
    (tmp_path / "consolidated.safetensors.index.json").write_bytes(as_bytes(extra))

    snapshot = snapshot_of(tmp_path)

    troubled = [problem.file for problem in snapshot.problems]
    assert (snapshot.config is None) == (CONFIG in troubled)
    assert (FIRST in snapshot.headers) or (FIRST in troubled)
    for problem in snapshot.problems:
        assert problem.message.isprintable(), problem
    for family in Family:
        for name, info in snapshot.loaded_by(family).items():
            assert name in snapshot.headers[info.file.name]
