from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble.checkpoint.index import CheckpointIndex, open_index, read_config
from nybble.core.errors import CheckpointError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def put(path: Path, *names: str) -> None:
    save_file({name: torch.ones(2) for name in names}, path)


def put_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


def sharded(folder: Path) -> Path:
    put(folder / ONE, "layers.1.b", "layers.1.a")
    put(folder / TWO, "layers.10.a", "embed")
    listed = {"embed": TWO, "layers.1.a": ONE, "layers.1.b": ONE, "layers.10.a": TWO}
    put_index(folder, {"metadata": {"total_size": 32}, "weight_map": listed})
    return folder


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    index = open_index(sharded(tmp_path))
    assert index.folder == tmp_path
    assert list(index.tensors) == ["layers.1.a", "layers.1.b", "embed", "layers.10.a"]
    assert index.files == (tmp_path / ONE, tmp_path / TWO)
    assert index.total_bytes == 32
    assert "embed" in index
    assert "lm_head" not in index
    assert [info.name for info in index.with_prefix("layers.1.")] == ["layers.1.a", "layers.1.b"]


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    put(tmp_path / "b.safetensors", "x")
    put(tmp_path / "a.safetensors", "y")
    assert list(open_index(tmp_path).tensors) == ["y", "x"]


def test_the_index_is_frozen(tmp_path: Path) -> None:
    index = open_index(sharded(tmp_path))
    assert isinstance(index, CheckpointIndex)
    with pytest.raises(TypeError):
        index.tensors["new"] = index.tensors["embed"]


def test_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    sharded(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert open_index(snapshot).files == (snapshot / ONE, snapshot / TWO)


def test_files_the_index_does_not_name_are_ignored(tmp_path: Path) -> None:
    sharded(tmp_path)
    put(tmp_path / "consolidated.safetensors", "embed")
    assert open_index(tmp_path).total_bytes == 32


def test_missing_folder(tmp_path: Path) -> None:
    message = refusal(lambda: open_index(tmp_path / "gone"))
    assert message == f"cannot open checkpoint folder {tmp_path}/gone: No such file or directory"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    put(tmp_path / ONE, "x")
    assert "Not a directory" in refusal(lambda: open_index(tmp_path / ONE))


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no weights, neither model.safetensors.index.json nor any *.safetensors" in refusal(
        lambda: open_index(tmp_path)
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_only_pickles(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = refusal(lambda: open_index(tmp_path))
    assert f"only pickle weights ({name}); nybble reads safetensors only" in message


def test_files_without_tensors(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors")
    assert "its 1 safetensors files hold no tensors" in refusal(lambda: open_index(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "index.json: not valid JSON"),
        ("[]", "index.json: expected a JSON object, found []"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the name 'a' appears twice"),
        ({}, "index.json: expected a 'weight_map' object, found None"),
        ({"weight_map": ["a"]}, "expected a 'weight_map' object, found ['a']"),
        ({"weight_map": {}}, "its weight_map lists no tensors"),
        ({"weight_map": {"a": 3}}, "the file of tensor 'a' is not a string: 3"),
        ({"weight_map": {"a": None}}, "the file of tensor 'a' is not a string: None"),
    ],
    ids=str,
)
def test_broken_index(tmp_path: Path, content: object, words: str) -> None:
    put_index(tmp_path, content)
    assert words in refusal(lambda: open_index(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:\\model.safetensors",
        "..",
        ".",
        "",
        "model.bin",
        "model.safetensors\0",
        "model\0.safetensors",
        "model\n.safetensors",
        "\ud800.safetensors",
        "m" * 300 + ".safetensors",
    ],
    ids=ascii,
)
def test_path_traversal(tmp_path: Path, name: str) -> None:
    put_index(tmp_path, {"weight_map": {"a": name}})
    message = refusal(lambda: open_index(tmp_path))
    assert "the file of tensor 'a' must be a plain *.safetensors name" in message


def test_missing_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / ONE).unlink()
    assert f"1 of 2 shards are missing, first {ONE}" in refusal(lambda: open_index(tmp_path))
    (tmp_path / TWO).unlink()
    assert f"2 of 2 shards are missing, first {ONE}" in refusal(lambda: open_index(tmp_path))


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / TWO).unlink()
    (tmp_path / TWO).symlink_to(tmp_path / "gone")
    assert f"{TWO}: No such file" in refusal(lambda: open_index(tmp_path))


def test_a_pipe_as_index(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "not a regular file" in refusal(lambda: open_index(tmp_path))


def test_a_listed_tensor_that_is_not_there(tmp_path: Path) -> None:
    put(tmp_path / ONE, "x")
    put_index(tmp_path, {"weight_map": {"x": ONE, "y": ONE}})
    message = refusal(lambda: open_index(tmp_path))
    assert f"lists tensor 'y' in {ONE}, which does not hold it" in message


def test_a_tensor_that_is_not_listed(tmp_path: Path) -> None:
    put(tmp_path / ONE, "x", "y")
    put_index(tmp_path, {"weight_map": {"x": ONE}})
    message = refusal(lambda: open_index(tmp_path))
    assert f"tensor 'y' is in {ONE}, but model.safetensors.index.json does not list it" in message


def test_a_tensor_that_is_listed_elsewhere(tmp_path: Path) -> None:
    put(tmp_path / ONE, "x")
    put(tmp_path / TWO, "x", "y")
    put_index(tmp_path, {"weight_map": {"x": ONE, "y": TWO}})
    message = refusal(lambda: open_index(tmp_path))
    assert f"tensor 'x' is in {TWO}, but model.safetensors.index.json lists it in {ONE}" in message


def test_the_same_name_in_two_files(tmp_path: Path) -> None:
    put(tmp_path / "a.safetensors", "x")
    put(tmp_path / "b.safetensors", "x")
    message = refusal(lambda: open_index(tmp_path))
    assert "tensor 'x' is in both a.safetensors and b.safetensors" in message


def test_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"b": 1, "a": {"c": [1.5, null]}}')
    assert list(read_config(tmp_path).items()) == [("b", 1), ("a", {"c": [1.5, None]})]


def test_missing_config(tmp_path: Path) -> None:
    assert "config.json: No such file" in refusal(lambda: read_config(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}'])
def test_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json: " in refusal(lambda: read_config(tmp_path))


def test_config_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "config.json: not a regular file" in refusal(lambda: read_config(tmp_path))
