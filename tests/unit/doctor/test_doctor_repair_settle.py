"""Every tensor of the model once, whatever the index says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    Tiny,
    read_json,
    read_weights,
    tiny_tensors,
    write_json,
    write_tiny,
)
from support.repairs import (
    Quantized,
    Tensors,
    bytes_of,
    changed,
    mend,
    stored_bytes,
    tensors_of,
)

from nybble.core.errors import CheckpointError, UnsupportedArchitecture

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(tiny_base, tmp_path_factory.mktemp("quantized"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A base in three files and an index."""
    return write_tiny(tmp_path / "sharded", Tiny(shards=3))


def whole() -> dict[str, object]:
    return {name: bytes_of(tensor) for name, tensor in tiny_tensors(Tiny()).items()}


def edit_map(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = read_json(folder / INDEX)
    change(index["weight_map"])
    write_json(folder / INDEX, index)


def test_a_file_that_is_not_listed_gives_what_is_needed(sharded: Path) -> None:
    second = "model-00002-of-00003.safetensors"

    def forget(weight_map: dict[str, str]) -> None:
        for name in [name for name, file in weight_map.items() if file == second]:
            del weight_map[name]

    edit_map(sharded, forget)
    draft = mend(sharded)
    assert tensors_of(draft) == whole()
    assert [done.action for done in draft.done] == ["index"]


def test_a_stale_file_is_left_out(sharded: Path) -> None:
    name = "model.language_model.norm.weight"
    stale = {name: torch.ones(128, dtype=torch.bfloat16), "junk": torch.ones(1)}
    for file in ("model.safetensors", "zzz.safetensors"):
        save_file(stale, sharded / file)
    draft = mend(sharded)
    assert tensors_of(draft) == whole()
    assert sum("left out" in done.text for done in draft.done) == 2


def test_of_two_copies_the_listed_one_counts(sharded: Path) -> None:
    name = "model.language_model.norm.weight"
    for file in sharded.glob("*.safetensors"):
        tensors = load_file(file)
        if name not in tensors:
            save_file({**tensors, name: torch.ones(128, dtype=torch.bfloat16)}, file)
    assert tensors_of(mend(sharded)) == whole()


def test_an_index_of_other_files_is_not_believed(sharded: Path) -> None:
    weights = read_weights(sharded)
    for file in sharded.glob("*.safetensors"):
        file.unlink()
    save_file(weights, sharded / "model.safetensors")
    assert tensors_of(mend(sharded)) == whole()


def test_a_file_that_is_cut_short_is_lost(sharded: Path) -> None:
    cut = sharded / "model-00003-of-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "download the checkpoint again" in mend(sharded).unmended[0]


def test_what_is_stored_twice_is_stored_once(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    trunk = "model.language_model.layers.0.mlp.down_proj.weight"
    head = "mtp.layers.0.mlp.down_proj.weight"

    def double(tensors: Tensors) -> None:
        tensors[trunk] = read_weights(tiny_base)[trunk]
        tensors[head] = read_weights(tiny_base)[head]

    draft = mend(changed(quantized("gptq", True), tmp_path / "twice", double))
    assert trunk not in draft.entries
    assert trunk.replace("weight", "qweight") in draft.entries
    assert head in draft.entries
    assert head.replace("weight", "qweight") not in draft.entries


@pytest.mark.parametrize("names", [[], ["GPT2LMHeadModel"], None, 3])
def test_an_unknown_model_is_refused(tiny_base: Path, tmp_path: Path, names: object) -> None:
    folder = changed(tiny_base, tmp_path / "x", config=lambda c: c.update(architectures=names))
    with pytest.raises((UnsupportedArchitecture, CheckpointError)):
        mend(folder)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "x")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is missing or broken"):
        mend(folder)


def test_a_head_under_other_names_is_renamed(quantized: Quantized, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            tensors[f"model.language_model.{name}"] = tensors.pop(name)

    folder = changed(quantized("gptq"), tmp_path / "renamed", rename)
    assert tensors_of(mend(folder)) == stored_bytes(quantized("gptq"))
