"""Closed-form layouts are those of transformers' own modules and of checkpoints as written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Tiny, tiny_config, tiny_tensors
from support.dense_checkpoints import CONFIGS as DENSE_CONFIGS
from support.dense_checkpoints import Dense, dense_config, dense_tensors
from support.moe_checkpoints import Moe, moe_config, moe_tensors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import nybble
from nybble.arch.blocks import expected_shapes
from nybble.arch.registry import architecture_of
from nybble.checkpoint.headers import read_header
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Layout

Shapes = dict[str, tuple[int, ...]]

BUNDLED = Path(nybble.__file__).parent / "assets" / "tiny"
TINIES = [
    Tiny(),
    Tiny(wrapper=False),
    Tiny(tied=True),
    Tiny(wrapper=False, tied=True),
    Tiny(mtp=False),
    Tiny(text=(("linear_num_value_heads", 2), ("layer_types", ["full_attention"] * 4))),
]
BIASED = Tiny(text=(("attention_bias", True),))
DENSES = [
    *map(Dense, DENSE_CONFIGS),
    *(Dense(name, (("tie_word_embeddings", True),)) for name in DENSE_CONFIGS),
    *(Dense(name, (("tie_word_embeddings", False),)) for name in DENSE_CONFIGS),
    *(Dense(name, (("attention_bias", True),)) for name in DENSE_CONFIGS),
    Dense("LlamaForCausalLM", (("attention_bias", True), ("mlp_bias", True))),
    Dense("LlamaForCausalLM", (("num_key_value_heads", None), ("head_dim", 32))),
]
MOES = [
    Moe(),
    Moe(mtp="stacks"),
    Moe(mtp=None),
    Moe("Qwen3_5MoeForCausalLM", form="one by one"),
    Moe("Qwen3NextForCausalLM", form="one by one"),
    Moe("Qwen3NextForCausalLM", values=(("decoder_sparse_step", 2), ("attention_bias", True))),
]
SILENT: dict[str, dict[str, Any]] = {
    "Qwen3_5ForCausalLM": {"mtp_num_hidden_layers": 1},
    "Qwen3_5MoeForCausalLM": {"layer_types": None},
    "Qwen3NextForCausalLM": {"full_attention_interval": 3},
    **{name: {} for name in DENSE_CONFIGS if name.endswith("ForCausalLM")},
}
"""Architectures that have a text-only config.json, with some values of a silent one."""


def found(config: Mapping[str, Any]) -> Layout:
    layout = layout_of(config)
    assert layout is not None
    return layout


def as_stored(layout: Layout, like: Mapping[str, Any]) -> Shapes:
    """The layout's tensors, each stack as the checkpoint ``like`` this stores it."""
    shapes = dict(layout.tensors)
    for stack, names in layout.stacks.items():
        if stack not in like:
            del shapes[stack]
            shapes |= {f"{name}.weight": layout.linears[name].shape for name in names}
    return shapes


def check_stored(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert as_stored(found(config), shapes) == shapes


@pytest.mark.parametrize("tiny", TINIES, ids=str)
def test_qwen3_5_checkpoints(tiny: Tiny) -> None:
    check_stored(tiny_config(tiny), tiny_tensors(tiny))


@pytest.mark.parametrize("dense", DENSES, ids=str)
def test_dense_checkpoints(dense: Dense) -> None:
    check_stored(dense_config(dense), dense_tensors(dense))


@pytest.mark.parametrize("moe", MOES, ids=str)
def test_checkpoints_of_mixtures(moe: Moe) -> None:
    if moe.values:  # whose MTP layer differs from the one that the builder spells out
        check_text(moe_config(moe))
    else:
        check_stored(moe_config(moe), moe_tensors(moe))


def test_the_bundled_checkpoint() -> None:
    config = json.loads((BUNDLED / "config.json").read_text())
    header = read_header(BUNDLED / "model.safetensors")
    assert found(config).tensors == {name: info.shape for name, info in header.items()}


def check_text(config: dict[str, Any]) -> None:
    """All but a tower, of which ``arch`` knows nothing."""
    layout = found(config)
    tower = {name for name in layout.tensors if layout.part_of(name) == "vision"}
    text = {name: shape for name, shape in layout.tensors.items() if name not in tower}
    assert text == expected_shapes(architecture_of(config))


@pytest.mark.parametrize("tiny", [*TINIES, BIASED], ids=str)
def test_arch_says_the_same_of_qwen3_5(tiny: Tiny) -> None:
    check_text(tiny_config(tiny))


@pytest.mark.parametrize("dense", DENSES, ids=str)
def test_arch_says_the_same_of_dense_models(dense: Dense) -> None:
    check_text(dense_config(dense))


@pytest.mark.parametrize("name", SILENT)
def test_what_config_is_silent_on_is_what_transformers_takes(name: str) -> None:
    values = {"hidden_size": 96, "num_hidden_layers": 4, **SILENT[name]}
    check_text({"architectures": [name], **values})


def test_published_gemma_is_silent_on_its_heads() -> None:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    values: dict[str, Any] = {"model_type": "gemma3", "text_config": text}
    values["vision_config"] = {"hidden_size": 24, "num_hidden_layers": 2, "image_size": 64}
    check_model({"architectures": ["Gemma3ForConditionalGeneration"], **values})


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_wrapper_without_vision_config_has_the_default_tower(family: str) -> None:
    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[family]
    text = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = {"model_type": family, "text_config": text, "vision_config": None}
    check_model({"architectures": [f"{name}ForConditionalGeneration"], **config})


def check_model(config: dict[str, Any]) -> None:
    """The whole model, as transformers makes it of the same values."""
    values = {key: value for key, value in config.items() if key != "architectures"}
    made = AutoConfig.for_model(**values)
    is_wrapper = "text_config" in config
    loader = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        state = loader.from_config(made).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if made.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert found(config).tensors == shapes
