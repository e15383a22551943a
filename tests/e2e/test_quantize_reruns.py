"""Two runs of the same thing, and a run where something is already."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import Tiny as TinyForm
from support.checkpoints import (
    random_text,
    read_json,
    read_weights,
    tiny_tensors,
    write_weights,
)
from support.commands import snapshot

from nybble.core.errors import NybbleError, OutputError
from nybble.engine.load import load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Algorithm, Calibration, Gptq, Recipe, Rtn, Scheme, SignRound

Make = Callable[..., Path]


def log_without_seconds(folder: Path) -> list[dict[str, str]]:
    with (folder / "quant_log.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("block_seconds")) >= 0
    return rows


def same_tensors(one: Path, other: Path) -> bool:
    left, right = read_weights(one), read_weights(other)
    return set(left) == set(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


@pytest.mark.parametrize("name", ["signround", "importance"])
def test_two_runs_give_the_same_bytes(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path, name: str
) -> None:
    first = request.getfixturevalue(f"{name}_result")
    torch.manual_seed(12345)
    torch.randn(7)
    recipe = request.getfixturevalue(f"{name}_recipe")
    second = quantize(tiny_base, tmp_path / "second", recipe, "cpu").out
    file = "model.safetensors"
    assert (first / file).read_bytes() == (second / file).read_bytes()
    assert log_without_seconds(first) == log_without_seconds(second)
    manifests = [read_json(folder / "nybble.json") for folder in (first, second)]
    for manifest in manifests:
        del manifest["cost"]
    assert manifests[0] == manifests[1]


def test_another_seed_gives_other_bytes(
    tiny_base: Path, signround_recipe: Recipe, signround_result: Path, tmp_path: Path
) -> None:
    changed = signround_recipe.calibration.model_copy(update={"seed": 43})
    recipe = signround_recipe.model_copy(update={"calibration": changed})
    assert not same_tensors(
        signround_result, quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    )


def test_a_finished_result_is_found_and_left_alone(
    tiny_base: Path, signround_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert not quantize(tiny_base, out, signround_recipe, "cpu").already_finished
    before = snapshot(tmp_path)
    again = quantize(tiny_base, out, signround_recipe, "cpu")
    assert again.already_finished
    assert again.out == out
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"algorithm": SignRound(iters=3)},
        {"algorithm": Rtn(scale_init="mse")},
        {"max_shard_gb": 1.0},
    ],
    ids=["iterations", "scales", "shards"],
)
def test_another_recipe_does_not_touch_a_result(
    tiny_base: Path, signround_result: Path, signround_recipe: Recipe, change: dict[str, object]
) -> None:
    before = snapshot(signround_result)
    with pytest.raises(OutputError, match="another recipe"):
        quantize(tiny_base, signround_result, signround_recipe.model_copy(update=change), "cpu")
    assert snapshot(signround_result) == before
    assert [path.name for path in signround_result.parent.iterdir()] == [signround_result.name]


def test_another_text_does_not_touch_a_result(
    tiny_base: Path, signround_recipe: Recipe, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(random_text(800, seed=2), encoding="utf-8")
    calibration = signround_recipe.calibration.model_copy(update={"source": str(text)})
    recipe = signround_recipe.model_copy(update={"calibration": calibration})
    quantize(tiny_base, tmp_path / "out", recipe, "cpu")
    before = snapshot(tmp_path / "out")
    text.write_text(random_text(800, seed=3), encoding="utf-8")
    with pytest.raises(OutputError, match="calibration text"):
        quantize(tiny_base, tmp_path / "out", recipe, "cpu")
    assert snapshot(tmp_path / "out") == before


def test_other_weights_under_the_same_names_are_another_job(
    make_tiny: Make, rtn_recipe: Recipe, tmp_path: Path
) -> None:
    """A fine-tune has its base's headers: its result must not be taken for the base's."""
    base = make_tiny()
    quantize(base, tmp_path / "out", rtn_recipe, "cpu")
    write_weights(base, tiny_tensors(TinyForm(seed=1)))
    with pytest.raises(OutputError, match="another"):
        quantize(base, tmp_path / "out", rtn_recipe, "cpu")


def test_a_result_whose_weights_are_gone_is_not_finished(
    tiny_base: Path, rtn_recipe: Recipe, tmp_path: Path
) -> None:
    out = quantize(tiny_base, tmp_path / "out", rtn_recipe, "cpu").out
    (out / "model.safetensors").unlink()
    with pytest.raises(NybbleError):
        quantize(tiny_base, out, rtn_recipe, "cpu")


def test_a_file_in_the_way_is_left_alone(
    tiny_base: Path, rtn_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        quantize(tiny_base, tmp_path / "out", rtn_recipe, "cpu")
    assert (tmp_path / "out").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_foreign_folder_is_left_alone(
    tiny_base: Path, rtn_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        quantize(tiny_base, out, rtn_recipe, "cpu")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_the_base_itself_is_no_output(make_tiny: Make, rtn_recipe: Recipe) -> None:
    base = make_tiny()
    before = snapshot(base)
    with pytest.raises(OutputError):
        quantize(base, base, rtn_recipe, "cpu")
    assert snapshot(base) == before


def test_what_a_killed_run_left_is_replaced(
    tiny_base: Path, rtn_recipe: Recipe, rtn_result: Path, tmp_path: Path
) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "model.safetensors.partial").write_bytes(b"half")
    (left / "stray.json").write_text("{}")
    out = quantize(tiny_base, tmp_path / "out", rtn_recipe, "cpu").out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in out.iterdir()} == {path.name for path in rtn_result.iterdir()}


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.3.mlp.up_proj.weight", "mtp.norm.weight"]
)
def test_nothing_is_left_of_a_failed_run(
    make_tiny: Make, signround_recipe: Recipe, tmp_path: Path, name: str
) -> None:
    base, weights = make_tiny(), tiny_tensors(TinyForm())
    weights[name].view(-1)[3] = float("nan")
    write_weights(base, weights)
    with pytest.raises(NybbleError, match=name):
        quantize(base, tmp_path / "out", signround_recipe, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "lm_head.weight",
        "model.language_model.norm.weight",
        "model.language_model.embed_tokens.weight",
    ],
)
@pytest.mark.parametrize("algorithm", [Gptq(), SignRound(iters=2, batch_size=4)], ids=str)
def test_a_broken_head_is_named_before_it_spoils_others(
    make_tiny: Make, calibration: Calibration, tmp_path: Path, name: str, algorithm: Algorithm
) -> None:
    base, weights = make_tiny(), tiny_tensors(TinyForm())
    weights[name].view(-1)[-3] = float("inf")
    write_weights(base, weights)
    scheme = Scheme(mtp_bits=4, lm_head_bits=8)
    recipe = Recipe(scheme=scheme, algorithm=algorithm, calibration=calibration)
    with pytest.raises(NybbleError, match=rf"^{name} of the base has 1 NaN or infinite"):
        quantize(base, tmp_path / "out", recipe, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_many_shards_load_and_are_indexed(
    tiny_base: Path, signround_recipe: Recipe, signround_result: Path, tmp_path: Path
) -> None:
    recipe = signround_recipe.model_copy(update={"max_shard_gb": 0.0003})
    out = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    weights = read_weights(out)
    index = read_json(out / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    assert set(index["weight_map"]) == set(weights)
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(out / file, alone)
        held = read_weights(alone)
        assert all(index["weight_map"][name] == file for name in held)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 300_000
        shutil.rmtree(alone)
    assert same_tensors(out, signround_result)
    ids = torch.arange(20)[None]
    assert torch.equal(load_model(out).hidden(ids), load_model(signround_result).hidden(ids))


def test_a_sharded_base_gives_the_same_result(
    make_tiny: Make, signround_recipe: Recipe, signround_result: Path, tmp_path: Path
) -> None:
    out = quantize(make_tiny(shards=4), tmp_path / "out", signround_recipe, "cpu").out
    assert same_tensors(out, signround_result)
    assert not list(out.glob("*.index.json"))

    def by_module(folder: Path) -> dict[str, dict[str, str]]:
        return {row["module"]: row for row in log_without_seconds(folder)}

    assert by_module(out) == by_module(signround_result)
