from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    MTP_SHAPES,
    Tiny,
    quantized_modules,
    read_json,
    read_weights,
    write_json,
    write_weights,
)
from support.packed import dense

from nybble.arch.registry import architecture_of
from nybble.arch.spec import Experts
from nybble.checkpoint.index import CheckpointIndex
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError
from nybble.engine.load import load_model
from nybble.engine.stored import stored_grids, stored_parts
from nybble.packing.formats import FORMATS
from nybble.pipeline.quantize import quantize
from nybble.quant.grid import IntGrid
from nybble.recipe.schema import Recipe, Rtn, Scheme

PREFIX = Tiny().prefix
MODULE = f"{PREFIX}layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@pytest.fixture
def doctored(rtn_result: Path, tmp_path: Path) -> Callable[..., Path]:
    """A quantized checkpoint with changed tensors and a changed config.json."""

    def doctor(
        tensors: Callable[[Tensors], object] = lambda _: None,
        config: Callable[[Config], object] = lambda _: None,
    ) -> Path:
        weights, values = read_weights(rtn_result), read_json(rtn_result / "config.json")
        tensors(weights)
        config(values)
        write_weights(tmp_path, weights)
        write_json(tmp_path / "config.json", values)
        return tmp_path

    return doctor


def grids_of(folder: Path) -> dict[str, IntGrid | None]:
    with CheckpointReader(folder) as reader:
        return stored_grids(architecture_of(reader.config), reader.index, reader.config)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        grids_of(folder)
    message = str(caught.value)
    assert "\n" not in message
    with pytest.raises(CheckpointError):
        load_model(folder)
    return message


def test_a_sound_result_has_a_grid_for_each_quantized_weight(rtn_result: Path) -> None:
    grids = grids_of(rtn_result)
    packed = {name for name, grid in grids.items() if grid is not None}
    assert packed == {f"{module}.weight" for module in quantized_modules(PREFIX)}
    assert {grids[name] for name in packed} == {IntGrid(4, 128, True)}
    assert all(grids[name] is None for name in MTP_SHAPES)


def test_a_base_is_dense_throughout(tiny_base: Path) -> None:
    assert set(grids_of(tiny_base).values()) == {None}


@pytest.mark.parametrize("name", MTP_SHAPES)
def test_a_missing_tensor_of_the_mtp_head_is_refused(
    doctored: Callable[..., Path], name: str
) -> None:
    assert name in refused(doctored(lambda tensors: tensors.pop(name)))


def test_a_missing_kept_tensor_of_the_trunk_is_refused(doctored: Callable[..., Path]) -> None:
    name = f"{PREFIX}layers.0.linear_attn.A_log"
    assert name in refused(doctored(lambda tensors: tensors.pop(name)))


def undeclare_mtp(config: Config) -> None:
    del config["quantization_config"]["extra_config"][".*mtp.*"]
    del config["quantization_config"]["block_name_to_quantize"]


def test_an_mtp_head_declared_quantized_but_stored_dense_is_refused(
    doctored: Callable[..., Path],
) -> None:
    message = refused(doctored(config=undeclare_mtp))
    assert "mtp." in message
    assert "stored dense" in message


@pytest.mark.parametrize("kept", ["extra_config", "block_name_to_quantize"])
def test_either_of_the_two_declarations_keeps_the_mtp_head_dense(
    doctored: Callable[..., Path], kept: str
) -> None:
    def change(config: Config) -> None:
        if kept == "extra_config":
            del config["quantization_config"]["block_name_to_quantize"]
        else:
            del config["quantization_config"]["extra_config"][".*mtp.*"]

    assert grids_of(doctored(config=change))["mtp.fc.weight"] is None


def test_a_module_declared_dense_but_stored_packed_is_refused(
    doctored: Callable[..., Path],
) -> None:
    def change(config: Config) -> None:
        config["quantization_config"]["extra_config"][MODULE] = {"bits": 16, "data_type": "fp"}

    message = refused(doctored(config=change))
    assert message.startswith(MODULE)
    assert "declares it dense" in message


def test_a_packed_result_without_a_declaration_is_refused(doctored: Callable[..., Path]) -> None:
    def change(config: Config) -> None:
        del config["quantization_config"]

    assert "declares it dense" in refused(doctored(config=change))


def test_a_packed_head_is_refused(doctored: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]
        tensors["lm_head.qweight"] = torch.zeros(16, 320, dtype=torch.int32)

    assert "lm_head" in refused(doctored(change))


def test_a_dense_weight_declared_quantized_is_refused(doctored: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{MODULE}.{suffix}"]
        tensors[f"{MODULE}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)

    message = refused(doctored(change))
    assert f"{MODULE}.weight" in message
    assert "4-bit" in message


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_wrong_shape_of_a_packed_tensor_is_refused(
    doctored: Callable[..., Path], suffix: str
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{suffix}"] = tensors[f"{MODULE}.{suffix}"].T.contiguous()

    assert f"{MODULE}.{suffix}" in refused(doctored(change))


@pytest.mark.parametrize("suffix", ["qzeros", "scales"])
def test_a_missing_packed_tensor_is_refused(doctored: Callable[..., Path], suffix: str) -> None:
    message = refused(doctored(lambda tensors: tensors.pop(f"{MODULE}.{suffix}")))
    assert f"{MODULE}.{suffix}" in message


def test_a_group_size_that_is_not_the_stored_one_is_refused(doctored: Callable[..., Path]) -> None:
    def change(config: Config) -> None:
        config["quantization_config"]["group_size"] = 64

    message = refused(doctored(config=change))
    assert "has shape [1, " in message
    assert "calls for [2, " in message


def test_a_weight_in_both_forms_is_refused(doctored: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.weight"] = torch.zeros(256, 128, dtype=torch.bfloat16)

    message = refused(doctored(change))
    assert MODULE in message
    assert "twice" in message


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("scales", torch.bfloat16), ("scales", torch.float32), ("qweight", torch.int64)],
)
def test_a_packed_tensor_of_another_type_is_refused(
    doctored: Callable[..., Path], suffix: str, dtype: torch.dtype
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{suffix}"] = tensors[f"{MODULE}.{suffix}"].to(dtype)

    assert f"{MODULE}.{suffix}" in refused(doctored(change))


def test_a_dense_weight_of_another_shape_is_refused(doctored: Callable[..., Path]) -> None:
    def change(tensors: Tensors) -> None:
        tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].T.contiguous()

    message = refused(doctored(change))
    assert "mtp.fc.weight" in message
    assert "[256, 128]" in message
    assert "[128, 256]" in message


@pytest.mark.parametrize(
    "change",
    [
        {"packing_format": "auto_round:auto_awq"},
        {"sym": False},
        {"packing_format": None},
    ],
    ids=str,
)
def test_another_packing_is_refused(doctored: Callable[..., Path], change: Config) -> None:
    folder = doctored(config=lambda config: config["quantization_config"].update(change))
    assert "auto_round:auto_gptq" in refused(folder)


# --- All formats, quantized heads ---

HEADS = {"lm_head", *(name for name, shape in MTP_SHAPES.items() if len(shape) == 2)}


@pytest.fixture(scope="module")
def with_heads(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint in a format, with a quantized output head and MTP layer."""
    folder = tmp_path_factory.mktemp("heads")

    def make(name: str) -> Path:
        out = folder / name
        if not out.exists():
            scheme = Scheme(bits=4, group_size=64, lm_head_bits=8, mtp_bits=8)
            recipe = Recipe(algorithm=Rtn(), scheme=scheme, format=name)
            quantize(tiny_base, out, recipe, "cpu")
        return out

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_heads_have_their_grids(with_heads: Callable[[str], Path], name: str) -> None:
    grids = grids_of(with_heads(name))
    quantized = {key.removesuffix(".weight") for key, grid in grids.items() if grid is not None}
    mtp = {n.removesuffix(".weight") for n in HEADS if n.startswith("mtp.layers.")}
    assert quantized == quantized_modules(PREFIX) | mtp | {"lm_head"}
    assert grids["mtp.fc.weight"] is None
    assert grids["lm_head.weight"] == IntGrid(8, 64, True)
    assert grids["mtp.layers.0.mlp.up_proj.weight"] == IntGrid(8, 64, True)
    assert grids[f"{MODULE}.weight"] == IntGrid(4, 64, True)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_heads_load_as_what_their_codes_stand_for(
    with_heads: Callable[[str], Path], name: str
) -> None:
    model, stored = load_model(with_heads(name)), read_weights(with_heads(name))
    assert torch.equal(model.lm_head, dense(stored, "lm_head", bits=8))
    assert model.mtp is not None
    up = model.mtp.state_dict()["layers.0.mlp.up_proj.weight"]
    assert torch.equal(up, dense(stored, "mtp.layers.0.mlp.up_proj", bits=8))
    module = MODULE.removeprefix(PREFIX)
    assert torch.equal(model.trunk.state_dict()[f"{module}.weight"], dense(stored, MODULE))


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_of_another_format_are_refused(
    with_heads: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    other = {"compressed-tensors": "gptq"}.get(name, "compressed-tensors")
    write_weights(tmp_path, read_weights(with_heads(other)))
    write_json(tmp_path / "config.json", read_json(with_heads(name) / "config.json"))
    with pytest.raises(CheckpointError, match=rf"lacks .*, though .* config\.json declares {name}"):
        grids_of(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_is_never_packed(
    with_heads: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    weights = read_weights(with_heads(name))
    for key in [key for key in weights if key.startswith("lm_head.")]:
        weights[key.replace("lm_head", f"{PREFIX}embed_tokens")] = weights[key].clone()
    del weights[f"{PREFIX}embed_tokens.weight"]
    write_weights(tmp_path, weights)
    write_json(tmp_path / "config.json", read_json(with_heads(name) / "config.json"))
    with pytest.raises(CheckpointError, match=r"embed_tokens is stored quantized"):
        grids_of(tmp_path)


def test_a_block_nobody_reads_is_refused(doctored: Callable[..., Path]) -> None:
    folder = doctored(
        config=lambda config: config["quantization_config"].update(quant_method="awq")
    )
    assert "quant_method 'awq'" in refused(folder)


def test_inputs_sorted_by_activation_are_refused(
    with_heads: Callable[[str], Path], tmp_path: Path
) -> None:
    write_weights(tmp_path, read_weights(with_heads("gptq")))
    config = read_json(with_heads("gptq") / "config.json")
    config["quantization_config"]["desc_act"] = True
    write_json(tmp_path / "config.json", config)
    assert "desc_act true" in refused(tmp_path)


def test_a_stack_of_experts_may_be_stored_in_parts(tiny_base: Path) -> None:
    with CheckpointReader(tiny_base) as reader:
        arch = replace(architecture_of(reader.config), experts=Experts("mlp.experts", 2))
        stack, own = f"{PREFIX}layers.0.mlp.experts.gate_up_proj", f"{PREFIX}layers.0.mlp.experts"
        assert list(stored_parts(arch, reader.index, stack, (2, 64, 32))) == [
            (f"{own}.0.gate_proj.weight", (32, 32)),
            (f"{own}.0.up_proj.weight", (32, 32)),
            (f"{own}.1.gate_proj.weight", (32, 32)),
            (f"{own}.1.up_proj.weight", (32, 32)),
        ]
        whole = CheckpointIndex(tiny_base, {stack: next(iter(reader.index.tensors.values()))})
        assert list(stored_parts(arch, whole, stack, (2, 64, 32))) == [(stack, (2, 64, 32))]
        name = f"{MODULE}.weight"
        assert list(stored_parts(arch, whole, name, (256, 128))) == [(name, (256, 128))]
