from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import MTP_SHAPES, Tiny, tiny_config
from support.dense_checkpoints import Dense, dense_config
from support.moe_checkpoints import EXPERTS, HIDDEN, INNER, Moe, moe_config

from nybble.core.errors import CheckpointError
from nybble.doctor.findings import Part
from nybble.doctor.layout.parts import MAX_LINEARS
from nybble.doctor.layout.registry import layout_of
from nybble.doctor.layout.spec import Layout

QWEN_27B: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "qwen3_5_text",
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_value_heads": 48,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
        "mtp_num_hidden_layers": 1,
    },
    "vision_config": {"out_hidden_size": 5120},
}


def found(config: dict[str, Any]) -> Layout:
    layout = layout_of(config)
    assert layout is not None
    return layout


def changed(config: dict[str, Any], section: str | None = None, **values: Any) -> dict[str, Any]:
    result = copy.deepcopy(config)
    (result[section] if section else result).update(values)
    return result


def test_the_27b_has_its_published_shapes() -> None:
    layout = found(QWEN_27B)
    block, last = "model.language_model.layers.0", "model.language_model.layers.63"
    shapes = {
        f"{block}.linear_attn.in_proj_qkv": (10240, 5120),
        f"{block}.linear_attn.in_proj_z": (6144, 5120),
        f"{block}.linear_attn.in_proj_b": (48, 5120),
        f"{block}.linear_attn.out_proj": (5120, 6144),
        f"{last}.self_attn.q_proj": (12288, 5120),
        f"{last}.self_attn.k_proj": (1024, 5120),
        f"{last}.mlp.down_proj": (5120, 17408),
        "mtp.fc": (5120, 10240),
        "lm_head": (248320, 5120),
    }
    assert {name: layout.linears[name].shape for name in shapes} == shapes
    assert len([n for n in layout.tensors if n.startswith("mtp.")]) == 15
    assert len(layout.linears) == 2 + 27 * 4 + 48 * 8 + 16 * 7 + 1 + 8
    assert layout.blocks == "model.language_model.layers"
    assert layout.has_mtp
    assert layout.is_wrapper


def test_the_27b_takes_no_time() -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        found(QWEN_27B)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


def test_parts() -> None:
    layout = found(tiny_config(Tiny()))
    mtp = {name for name in layout.tensors if layout.part_of(name) is Part.MTP}
    assert mtp == set(MTP_SHAPES)
    parts = {name: linear.part for name, linear in layout.linears.items()}
    assert parts["mtp.fc"] is Part.MTP
    assert parts["model.visual.merger.linear_fc1"] is Part.VISION
    assert parts["lm_head"] is Part.TRUNK
    gemma = found(dense_config(Dense("Gemma3ForConditionalGeneration")))
    tower = [name for name in gemma.tensors if gemma.part_of(name) is Part.VISION]
    assert all(name.startswith(("model.vision", "model.multi")) for name in tower)
    assert len(tower) == 3 + 16 + 2 + 2


def test_experts_are_linears_and_stacks() -> None:
    layout = found(moe_config(Moe()))
    owner = "model.language_model.layers.2.mlp.experts"
    assert layout.tensors[f"{owner}.gate_up_proj"] == (EXPERTS, 2 * INNER, HIDDEN)
    assert f"{owner}.0.gate_proj.weight" not in layout.tensors
    assert layout.stacks[f"{owner}.gate_up_proj"][:3] == (
        f"{owner}.0.gate_proj",
        f"{owner}.0.up_proj",
        f"{owner}.1.gate_proj",
    )
    assert layout.linears[f"{owner}.3.down_proj"].shape == (HIDDEN, INNER)
    assert len(layout.stacks) == 2 * 5
    assert set().union(*layout.stacks.values()) <= set(layout.linears)


def test_an_mtp_head_is_there_if_config_calls_for_it() -> None:
    assert not found(tiny_config(Tiny(mtp=False))).has_mtp
    assert not found(changed(tiny_config(Tiny()), "text_config", mtp_num_hidden_layers=0)).has_mtp
    two = found(changed(tiny_config(Tiny()), "text_config", mtp_num_hidden_layers=2))
    assert "mtp.layers.1.mlp.down_proj" in two.linears
    assert found(moe_config(Moe("Qwen3NextForCausalLM"))).has_mtp  # whose config.json is silent


@pytest.mark.parametrize(
    ("top", "inside", "stored", "built"),
    [(False, False, 1, 1), (True, True, 0, 0), (True, False, 0, 1), (False, True, 1, 1)],
)
def test_ties_of_two_levels(top: bool, inside: bool, stored: bool, built: bool) -> None:
    config = changed(tiny_config(Tiny()), tie_word_embeddings=top)
    layout = found(changed(config, "text_config", tie_word_embeddings=inside))
    assert layout.tied is top
    assert layout.ties_disagree is (top != inside)
    assert ("lm_head.weight" in layout.tensors) is bool(stored)
    assert ("lm_head" in layout.linears) is bool(built)


def test_a_text_only_class_with_the_wrappers_config_has_its_names() -> None:
    config = changed(tiny_config(Tiny()), architectures=["Qwen3_5ForCausalLM"])
    layout = found(changed(config, "text_config", tie_word_embeddings=True))
    assert layout.tied
    assert not layout.ties_disagree
    assert layout.blocks == "model.language_model.layers"
    assert not [name for name in layout.tensors if "visual" in name]


@pytest.mark.parametrize("names", [None, [], "Qwen3ForCausalLM", [3], ["T5Model"], [["a"]], {}])
def test_unknown_architectures_have_no_layout(names: object) -> None:
    assert layout_of({"architectures": names}) is None
    assert layout_of({}) is None


BAD_TEXT: list[tuple[str, Any, str]] = [
    ("hidden_size", None, r"config.json has no text_config.hidden_size: a whole number"),
    ("hidden_size", "64", r"text_config.hidden_size '64': a whole number of 1 to"),
    ("hidden_size", True, "hidden_size True"),
    ("hidden_size", 64.0, "hidden_size 64.0"),
    ("hidden_size", -1, "hidden_size -1"),
    ("vocab_size", 10**30, "vocab_size 1000"),
    ("num_hidden_layers", 0, "num_hidden_layers 0: a whole number of 1 to 10000"),
    ("num_hidden_layers", 10_001, "num_hidden_layers 10001"),
    ("layer_types", ["full_attention"], "has 1 text_config.layer_types for 4 blocks"),
    ("layer_types", ["sliding_attention"] * 4, "layer_types .* a list of linear_attention and"),
    ("layer_types", [["x"], {}, 3, None], "layer_types"),
    ("layer_types", {"a": 1}, "layer_types"),
    ("attention_bias", "no", "attention_bias 'no': true or false"),
    ("tie_word_embeddings", 1, "tie_word_embeddings 1: true or false"),
    ("mtp_num_hidden_layers", [1], "mtp_num_hidden_layers"),
    ("mtp_num_hidden_layers", 10**9, "mtp_num_hidden_layers 1000000000: .* 0 to 10000"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_TEXT)
def test_unusable_values_are_refused_in_one_line(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        layout_of(changed(tiny_config(Tiny()), "text_config", **{key: value}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(tiny_config(Tiny()), text_config=None), "has no text_config"),
        (changed(tiny_config(Tiny()), text_config=[1]), r"text_config \[1\]: an object is needed"),
        (changed(tiny_config(Tiny()), vision_config="x"), "vision_config 'x': an object"),
        (changed(tiny_config(Tiny()), "vision_config", depth=0), "vision_config.depth 0"),
        (changed(tiny_config(Tiny()), "vision_config", patch_size=[16, 16]), "patch_size"),
        (changed(tiny_config(Tiny()), tie_word_embeddings="yes"), "has tie_word_embeddings 'yes'"),
        (moe_config(Moe(values=(("num_experts", 0),))), "num_experts 0"),
        (moe_config(Moe(values=(("num_experts", 2**31 - 1),))), "more than 250000 Linears"),
        (
            moe_config(Moe("Qwen3NextForCausalLM", values=(("mlp_only_layers", ["1"]),))),
            "mlp_only_layers .* a list of whole numbers",
        ),
        (
            moe_config(Moe("Qwen3NextForCausalLM", values=(("decoder_sparse_step", 0),))),
            "decoder_sparse_step 0",
        ),
        (dense_config(Dense("LlamaForCausalLM", (("head_dim", 0),))), "head_dim 0"),
        (
            dense_config(Dense("Gemma3ForConditionalGeneration")) | {"text_config": None},
            "has no text_config",
        ),
    ],
)
def test_other_unusable_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layout_of(config)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
CONFIGS = [
    tiny_config(Tiny()),
    moe_config(Moe("Qwen3NextForCausalLM")),
    dense_config(Dense("Gemma3ForConditionalGeneration")),
    dense_config(Dense("LlamaForCausalLM")),
]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_value_makes_anything_but_a_layout_or_an_error_of_one_line(data: st.DataObject) -> None:
    config = copy.deepcopy(data.draw(st.sampled_from(CONFIGS)))
    sections = [config, *(v for v in config.values() if isinstance(v, dict))]
    section = data.draw(st.sampled_from(sections))
    section[data.draw(st.sampled_from(sorted(section)))] = data.draw(json_values)
    try:
        layout = layout_of(config)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert layout is None or len(layout.linears) <= MAX_LINEARS
