"""config.json says what is stored, and the tensors are what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    read_json,
    read_weights,
    write_json,
)
from support.repairs import (
    FORMATS,
    Quantized,
    Tensors,
    changed,
    mend,
    stored_bytes,
    tensors_of,
    without,
)

from nybble.recipe.schema import Format

BLOCK = "quantization_config"


@pytest.fixture(scope="module")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(tiny_base, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("form", FORMATS)
def test_a_sound_checkpoint_is_left_alone(
    quantized: Quantized, tiny_base: Path, form: Format
) -> None:
    for packed in (False, True):
        folder = quantized(form, packed)
        draft = mend(
            folder, "rules", "index", "dtype", "zero-points", "desc-act", "sidecars", base=tiny_base
        )
        if not packed:
            assert draft.done == ()
        assert draft.unmended == ()
        assert draft.config == read_json(folder / "config.json")
        assert tensors_of(draft) == stored_bytes(folder)


def spoil_rules(config: dict[str, Any]) -> None:
    block = config[BLOCK]
    for key in ("extra_config", "dynamic", "modules_in_block_to_quantize"):
        block.pop(key, None)
    if "ignore" in block:
        block["ignore"] = ["mtp", "model.visual", "re:^model\\.language_model\\.x"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "spoil", [spoil_rules, lambda config: config.update({BLOCK: [1]}), lambda c: c.pop(BLOCK)]
)
def test_rules_are_made_from_what_is_stored(
    quantized: Quantized,
    tmp_path: Path,
    form: Format,
    packed: bool,
    spoil: Callable[[dict[str, Any]], object],
) -> None:
    folder = changed(quantized(form, packed), tmp_path / "spoilt", config=spoil)
    draft = mend(folder, "rules")
    expected = read_json(quantized(form, packed) / "config.json")[BLOCK]
    if spoil is spoil_rules:
        assert draft.config[BLOCK] == expected
    else:  # the default grid cannot be known, only every Linear's own
        assert draft.config[BLOCK]["quant_method"] == expected["quant_method"]
    assert draft.unmended == ()
    if form == "gptq":
        assert json.loads(draft.files["quantize_config.json"]) == draft.config[BLOCK]


def test_rules_keep_an_asymmetric_block_asymmetric(quantized: Quantized, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config[BLOCK]["sym"] = False
        config[BLOCK]["extra_config"] = {}

    folder = changed(quantized("auto_round"), tmp_path / "asymmetric", config=change)
    assert mend(folder, "rules").config[BLOCK]["sym"] is False


def test_a_block_without_anything_quantized_is_dropped(tiny_base: Path, tmp_path: Path) -> None:
    folder = changed(
        tiny_base, tmp_path / "dense", config=lambda c: c.update({BLOCK: {"quant_method": "gptq"}})
    )
    draft = mend(folder, "rules")
    assert BLOCK not in draft.config
    assert draft.config == read_json(tiny_base / "config.json")


def test_half_a_fused_group_cannot_be_declared(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    name = "model.language_model.layers.3.self_attn.k_proj"

    def split(tensors: Tensors) -> None:
        without(name)(tensors)
        tensors[f"{name}.weight"] = read_weights(tiny_base)[f"{name}.weight"]

    folder = changed(quantized("gptq"), tmp_path / "split", split)
    draft = mend(folder, "rules")
    assert draft.config == read_json(folder / "config.json")
    assert "engines fuse them" in draft.unmended[0]


@pytest.mark.parametrize("form", ["auto_round", "gptq"])
def test_zero_points_are_stored_less_one(
    quantized: Quantized, tmp_path: Path, form: Format
) -> None:
    def add_one(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                tensors[name] = torch.full_like(tensors[name], -0x77777778)

    def second(config: dict[str, Any]) -> None:
        if form == "gptq":
            config[BLOCK]["checkpoint_format"] = "gptq_v2"

    folder = changed(quantized(form), tmp_path / "v2", add_one, second)
    draft = mend(folder, "zero-points")
    assert tensors_of(draft) == stored_bytes(quantized(form))
    assert draft.config == read_json(quantized(form) / "config.json")


def test_an_order_that_is_none_is_taken_back(quantized: Quantized, tmp_path: Path) -> None:
    def claim(config: dict[str, Any]) -> None:
        config[BLOCK]["desc_act"] = True
        config[BLOCK]["dynamic"]["+:.*down_proj$"] = {"desc_act": True}

    folder = changed(quantized("gptq"), tmp_path / "claimed", config=claim)
    block = mend(folder, "desc-act").config[BLOCK]
    assert block["desc_act"] is False
    assert block["dynamic"]["+:.*down_proj$"] == {"desc_act": False}


def test_an_order_that_is_one_stays(quantized: Quantized, tmp_path: Path) -> None:
    def sort(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("g_idx"))
        tensors[name] = tensors[name].flip(0).contiguous()

    def claim(config: dict[str, Any]) -> None:
        config[BLOCK]["desc_act"] = True

    folder = changed(quantized("gptq"), tmp_path / "sorted", sort, claim)
    draft = mend(folder, "desc-act", "rules")
    assert draft.config[BLOCK]["desc_act"] is True
    assert "static groups" in draft.unmended[0]


def test_compressed_tensors_without_an_order_lose_its_claim(
    quantized: Quantized, tmp_path: Path
) -> None:
    def indices(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            ins = tensors[name].shape[1] * 8
            index = torch.arange(ins, dtype=torch.int32) // 32
            tensors[name.replace("weight_packed", "weight_g_idx")] = index

    def claim(config: dict[str, Any]) -> None:
        config[BLOCK]["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    good = quantized("compressed-tensors")
    draft = mend(changed(good, tmp_path / "claimed", indices, claim), "desc-act")
    assert draft.config[BLOCK]["config_groups"]["group_0"]["weights"]["actorder"] is None
    assert tensors_of(draft) == stored_bytes(good)


@pytest.mark.parametrize("is_stored", [True, False])
def test_both_levels_say_of_the_head_what_is_stored(
    tiny_base: Path, tmp_path: Path, is_stored: bool
) -> None:
    folder = changed(
        tiny_base,
        tmp_path / "x",
        (lambda _: None) if is_stored else without("lm_head"),
        lambda config: config["text_config"].update(tie_word_embeddings=True),
    )
    config = mend(folder).config
    assert config["tie_word_embeddings"] is not is_stored
    assert config["text_config"]["tie_word_embeddings"] is not is_stored


def test_a_model_that_config_json_describes_wrongly_is_as_the_base_says(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["text_config"]["layer_types"] = ["full_attention"] * 4
        config["text_config"]["rope_theta_of_mine"] = 1
        del config["vision_config"]

    good = quantized("auto_round")
    draft = mend(changed(good, tmp_path / "x", config=change), base=tiny_base)
    expected = read_json(good / "config.json")
    expected["text_config"]["rope_theta_of_mine"] = 1
    assert draft.config == expected
    assert "layer_types" in draft.done[0].text


@pytest.mark.parametrize("form", FORMATS)
def test_a_lost_config_is_the_bases_with_a_block_of_its_own(
    quantized: Quantized, tiny_base: Path, tmp_path: Path, form: Format
) -> None:
    folder = changed(quantized(form), tmp_path / "x")
    (folder / "config.json").unlink()
    draft = mend(folder, base=tiny_base)
    assert draft.config == read_json(quantized(form) / "config.json")


def test_a_desc_act_that_is_not_said_is_said(quantized: Quantized, tmp_path: Path) -> None:
    folder = changed(quantized("gptq"), tmp_path / "x", config=lambda c: c[BLOCK].pop("desc_act"))
    assert mend(folder, "desc-act").config[BLOCK]["desc_act"] is False


def test_rules_are_not_made_of_tensors_that_do_not_fit(
    quantized: Quantized, tmp_path: Path
) -> None:
    def cut(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith("down_proj.scales"))
        tensors[name] = tensors[name][:1].clone()

    draft = mend(changed(quantized("gptq"), tmp_path / "x", cut), "rules")
    assert draft.done == ()
    assert "do not fit each other" in draft.unmended[0]


HOSTILE: tuple[Any, ...] = (None, [], {}, "x", -1, 2.5, True, [[1]], {"a": {"b": []}}, 10**30)


@pytest.mark.parametrize("form", FORMATS)
def test_a_block_of_anything_is_no_traceback(
    quantized: Quantized, tmp_path: Path, form: Format
) -> None:
    good = quantized(form)
    folder = changed(good, tmp_path / "x")
    values = read_json(good / "config.json")
    for number, key in enumerate(values[BLOCK]):
        for value in (HOSTILE * 2)[number % len(HOSTILE) :][:3]:
            write_json(folder / "config.json", {**values, BLOCK: {**values[BLOCK], key: value}})
            draft = mend(folder, "rules", "desc-act", "zero-points", "dtype")
            assert draft.config[BLOCK]["quant_method"] == values[BLOCK]["quant_method"]
