"""What is lost or spoilt comes from the base, or is told; without a base it is de-quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    MTP_SHAPES,
    Tiny,
    read_json,
    read_weights,
    write_json,
    write_tiny,
)
from support.packed import dense
from support.repairs import (
    FORMATS,
    Quantized,
    Tensors,
    bytes_of,
    changed,
    mend,
    stored_bytes,
    tensors_of,
    without,
)

from nybble.core.errors import CheckpointError
from nybble.recipe.schema import Format


@pytest.fixture(scope="module")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    return Quantized(tiny_base, tmp_path_factory.mktemp("quantized"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lost", ["mtp.", "mtp.layers.0.mlp.", "mtp.norm"])
def test_a_lost_head_is_grafted(
    quantized: Quantized, tiny_base: Path, tmp_path: Path, form: Format, lost: str
) -> None:
    folder = changed(quantized(form), tmp_path / "lost", without(lost))
    draft = mend(folder, "graft-mtp", base=tiny_base)
    assert tensors_of(draft) == stored_bytes(quantized(form))
    assert draft.config == read_json(quantized(form) / "config.json")
    assert {e.file for n, e in draft.entries.items() if n.startswith("mtp.")} == {"mtp.safetensors"}


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_head_is_replaced_by_the_exact_one(
    quantized: Quantized, tiny_base: Path, form: Format
) -> None:
    draft = mend(quantized(form, True), "graft-mtp", base=tiny_base)
    assert tensors_of(draft) == stored_bytes(quantized(form))
    assert draft.config == read_json(quantized(form) / "config.json")


@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_head_without_a_base_is_dequantized(quantized: Quantized, form: Format) -> None:
    folder = quantized(form, True)
    stored = read_weights(folder)
    draft = mend(folder, "graft-mtp")
    assert {name for name in draft.entries if name.startswith("mtp.")} == set(MTP_SHAPES)
    assert draft.config == read_json(quantized(form) / "config.json")
    for name in MTP_SHAPES:
        if name not in stored:
            expected = dense(stored, name.removesuffix(".weight")).bfloat16()
            assert bytes_of(draft.entries[name].read()) == bytes_of(expected)


def test_a_lost_head_without_a_base_is_told(quantized: Quantized, tmp_path: Path) -> None:
    folder = changed(quantized("gptq"), tmp_path / "lost", without("mtp."))
    draft = mend(folder, "graft-mtp")
    assert draft.done == ()
    assert "mtp." in draft.unmended[0]
    assert "--base" in draft.unmended[0]


def test_a_head_that_config_json_forgot_is_called_for_again(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    folder = changed(
        quantized("gptq"),
        tmp_path / "lost",
        without("mtp."),
        lambda config: config["text_config"].pop("mtp_num_hidden_layers"),
    )
    draft = mend(folder, "graft-mtp", base=tiny_base)
    assert draft.layout.has_mtp
    assert draft.config == read_json(quantized("gptq") / "config.json")


def test_what_else_is_lost_comes_from_the_base(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    def drop(tensors: Tensors) -> None:
        without("model.visual.")(tensors)
        without("lm_head.")(tensors)
        without("model.language_model.layers.1.input_layernorm")(tensors)

    folder = changed(quantized("auto_round"), tmp_path / "lost", drop)
    assert tensors_of(mend(folder, base=tiny_base)) == stored_bytes(quantized("auto_round"))


def test_a_lost_quantized_linear_stays_lost(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    lost = "model.language_model.layers.1.mlp.down_proj"
    folder = changed(quantized("auto_round"), tmp_path / "lost", without(lost))
    draft = mend(folder, base=tiny_base)
    assert draft.done == ()
    assert lost in draft.unmended[0]


@pytest.mark.parametrize("values", [{"seed": 1}, {"text": (("intermediate_size", 128),)}])
def test_another_models_head_is_refused(
    quantized: Quantized, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = changed(quantized("gptq"), tmp_path / "lost", without("mtp."))
    other = write_tiny(tmp_path / "other", Tiny(**values))
    with pytest.raises(CheckpointError, match=r"is not the base of|does not fit"):
        mend(folder, "graft-mtp", base=other)


def test_a_base_without_a_head_is_told(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    folder = changed(quantized("gptq"), tmp_path / "lost", without("mtp."))
    base = changed(tiny_base, tmp_path / "base", without("mtp."))
    draft = mend(folder, "graft-mtp", base=base)
    assert "give another base" in draft.unmended[0]


def to_half(tensors: Tensors) -> None:
    for name in tensors:
        if tensors[name].dtype == torch.bfloat16:
            tensors[name] = tensors[name].half()


def claim_half(config: dict[str, Any]) -> None:
    config["dtype"] = config["text_config"]["dtype"] = "float16"


def test_cast_tensors_get_the_bases_bytes_back(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    folder = changed(quantized("auto_round"), tmp_path / "cast", to_half, claim_half)
    draft = mend(folder, "dtype", base=tiny_base)
    assert tensors_of(draft) == stored_bytes(quantized("auto_round"))
    assert draft.config == read_json(quantized("auto_round") / "config.json")


def test_a_wrong_dtype_in_config_json_alone_needs_no_base(
    quantized: Quantized, tmp_path: Path
) -> None:
    good = quantized("auto_round")
    draft = mend(changed(good, tmp_path / "claimed", config=claim_half), "dtype")
    assert draft.config == read_json(good / "config.json")


def test_a_cast_without_a_base_is_told(quantized: Quantized, tmp_path: Path) -> None:
    folder = changed(quantized("auto_round"), tmp_path / "cast", to_half, claim_half)
    draft = mend(folder, "dtype")
    assert draft.done == ()
    assert "--base" in draft.unmended[0]


def test_missing_side_files_come_from_the_base(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    folder = changed(quantized("gptq"), tmp_path / "bare")
    draft = mend(folder, "sidecars", base=tiny_base)
    names = {"preprocessor_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"}
    assert set(draft.files) == names
    assert all(draft.files[name] == (tiny_base / name).read_bytes() for name in names)


def test_a_template_of_its_own_is_not_overruled(
    quantized: Quantized, tiny_base: Path, tmp_path: Path
) -> None:
    folder = changed(quantized("gptq"), tmp_path / "bare")
    values = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**values, "chat_template": "{{ messages }}"})
    assert "chat_template.jinja" not in mend(folder, "sidecars", base=tiny_base).files


def test_a_head_of_another_shape_comes_from_the_base(tiny_base: Path, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-32].clone()

    draft = mend(changed(tiny_base, tmp_path / "x", cut), base=tiny_base)
    assert tensors_of(draft) == stored_bytes(tiny_base)


def test_a_broken_norm_tells_nothing_of_the_base(tiny_base: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"][0] = float("nan")

    assert mend(changed(tiny_base, tmp_path / "x", spoil), base=tiny_base).done == ()
