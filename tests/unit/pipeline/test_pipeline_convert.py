from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    SIDECARS,
    Tiny,
    quantized_modules,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from support.packed import codes_and_scales

from nybble.core.errors import CheckpointError, OutputError, RecipeError
from nybble.engine.load import load_model
from nybble.packing.formats import FORMATS
from nybble.pipeline.convert import convert
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Recipe, Rtn, Scheme

PREFIX = Tiny().prefix
MODULE = f"{PREFIX}layers.1.mlp.up_proj"


@pytest.fixture(scope="module", params=["w4", "w8", "w3", "w2", "heads"])
def quantized(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint in AutoRound's format: of each width, and with quantized heads."""
    schemes = {
        "w4": Scheme(),
        "w8": Scheme(bits=8, group_size=-1),
        "w3": Scheme(bits=3, group_size=32),
        "w2": Scheme(bits=2, group_size=64),
        "heads": Scheme(bits=4, mtp_bits=8, lm_head_bits=8),
    }
    recipe = Recipe(algorithm=Rtn(), scheme=schemes[request.param])
    out = tmp_path_factory.mktemp("quantized") / "r"
    return quantize(tiny_base, out, recipe, "cpu").out


def safetensors_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_three_conversions_lead_back_to_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    source = quantized
    for name in ("gptq", "compressed-tensors", "auto_round"):
        convert(source, tmp_path / name, name)
        source = tmp_path / name
    assert safetensors_of(source) == safetensors_of(quantized)
    assert read_json(source / "config.json") == read_json(quantized / "config.json")
    one, other = (read_json(folder / "nybble.json") for folder in (source, quantized))
    assert one["tensors"] == other["tensors"]


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_codes_scales_and_kept_tensors_stay(quantized: Path, tmp_path: Path, name: str) -> None:
    convert(quantized, tmp_path / "out", name)
    before, after = read_weights(quantized), read_weights(tmp_path / "out")
    block = read_json(quantized / "config.json")["quantization_config"]
    modules = {key.removesuffix(".qweight") for key in before if key.endswith(".qweight")}
    assert modules >= quantized_modules(PREFIX)
    for module in modules:
        grid = FORMATS["auto_round"].declared_grid(block, module)
        assert grid is not None
        for old, new in zip(
            codes_and_scales(before, module, grid.bits),
            codes_and_scales(after, module, grid.bits),
            strict=True,
        ):
            assert (old == new).all(), module
    suffixes = FORMATS[name].suffixes
    parts = {f"{module}.{suffix}" for module in modules for suffix in suffixes}
    kept = set(after) - parts
    assert parts <= set(after)
    assert kept == {key for key in before if key.rpartition(".")[0] not in modules}
    assert all(torch.equal(after[key], before[key]) for key in kept)


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors"])
def test_the_result_computes_the_same_logits(rtn_result: Path, tmp_path: Path, name: str) -> None:
    convert(rtn_result, tmp_path / "out", name)
    ids = torch.arange(40)[None]
    one, other = load_model(rtn_result), load_model(tmp_path / "out")
    assert torch.equal(one.logits(one.hidden(ids)), other.logits(other.hidden(ids)))
    assert torch.equal(one.lm_head, other.lm_head)


def test_sidecars_and_manifest_come_along(rtn_result: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(rtn_result, out, "gptq")
    for name in (*SIDECARS, "tokenizer.json", "quant_log.csv"):
        assert (out / name).read_bytes() == (rtn_result / name).read_bytes(), name
    config = read_json(out / "config.json")
    assert read_json(out / "quantize_config.json") == config["quantization_config"]
    before = read_json(rtn_result / "config.json")
    del before["quantization_config"], config["quantization_config"]
    assert config == before
    manifest, old = read_json(out / "nybble.json"), read_json(rtn_result / "nybble.json")
    assert manifest["recipe"] == old["recipe"]
    assert manifest["job"] != old["job"]
    assert manifest["converted_to"] == "gptq"
    weights = read_weights(out)
    assert set(manifest["tensors"]) == set(weights)
    for name, record in manifest["tensors"].items():
        data = weights[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest(), name
        packed = name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
        assert record["fate"] == ("quantized" if packed else "kept"), name
    convert(out, tmp_path / "back", "compressed-tensors")
    assert not (tmp_path / "back" / "quantize_config.json").exists()


def test_a_source_without_a_manifest_gets_none(rtn_result: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_weights(bare, read_weights(rtn_result), shards=3)
    write_json(bare / "config.json", read_json(rtn_result / "config.json"))
    convert(bare, tmp_path / "out", "gptq", max_shard_gb=1e-4)
    assert not (tmp_path / "out" / "nybble.json").exists()
    assert len(safetensors_of(tmp_path / "out")) > 3
    ids = torch.arange(20)[None]
    one, other = load_model(rtn_result), load_model(tmp_path / "out")
    assert torch.equal(one.logits(one.hidden(ids)), other.logits(other.hidden(ids)))


def test_groups_that_are_spelled_out_are_left_behind(rtn_result: Path, tmp_path: Path) -> None:
    convert(rtn_result, tmp_path / "gptq", "gptq")
    weights = read_weights(tmp_path / "gptq")
    weights[f"{MODULE}.g_idx"] = torch.zeros(128, dtype=torch.int32)
    write_weights(tmp_path / "gptq", weights)
    convert(tmp_path / "gptq", tmp_path / "out", "auto_round")
    assert f"{MODULE}.g_idx" not in read_weights(tmp_path / "out")
    weights[f"{MODULE}.g_idx"][3] = 1
    write_weights(tmp_path / "gptq", weights)
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx sorts"):
        convert(tmp_path / "gptq", tmp_path / "other", "auto_round")
    assert not (tmp_path / "other").exists()


def test_a_scale_that_the_new_type_cannot_hold_is_refused(rtn_result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fine"
    folder.mkdir()
    weights = read_weights(rtn_result)
    weights[f"{MODULE}.scales"][0, 0] = 1 + 2.0**-10
    write_weights(folder, weights)
    write_json(folder / "config.json", read_json(rtn_result / "config.json"))
    with pytest.raises(CheckpointError, match="would change the weights"):
        convert(folder, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_a_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        convert(tiny_base, tmp_path / "out", "gptq")


def test_an_unknown_format_is_refused(rtn_result: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give one of auto_round, gptq, compressed-tensors"):
        convert(rtn_result, tmp_path / "out", "awq")


@pytest.mark.parametrize("what", ["folder", "file", "source"])
def test_nothing_is_overwritten(rtn_result: Path, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    if what == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif what == "file":
        out.write_text("mine")
    else:
        out = rtn_result
    with pytest.raises(OutputError, match="exists already"):
        convert(rtn_result, out, "gptq")


def test_a_source_that_is_stored_otherwise_than_declared_is_refused(
    rtn_result: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    write_weights(folder, read_weights(rtn_result))
    config: dict[str, Any] = read_json(rtn_result / "config.json")
    config["quantization_config"]["group_size"] = 64
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match="has shape"):
        convert(folder, tmp_path / "out", "gptq")
