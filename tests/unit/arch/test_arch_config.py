from __future__ import annotations

from typing import Any

import pytest
from support.checkpoints import Tiny, tiny_config

from nybble.arch.blocks import expected_shapes
from nybble.arch.registry import architecture_of
from nybble.core.errors import CheckpointError, NybbleError, UnsupportedArchitecture


def refused(config: dict[str, Any], kind: type[NybbleError] = CheckpointError) -> str:
    """Building the architecture and its modules must end in one line, whichever finds it."""
    with pytest.raises(kind) as caught:
        expected_shapes(architecture_of(config))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "names",
    [["GPT2LMHeadModel"], [], None, "Qwen3_5ForCausalLM", {}, [{}], [None], [["x"]]],
    ids=repr,
)
def test_an_unknown_architecture_is_told_what_is_supported(names: object) -> None:
    config = {**tiny_config(Tiny()), "architectures": names}
    message = refused(config, UnsupportedArchitecture)
    assert "Qwen3_5ForConditionalGeneration" in message
    assert "Qwen3_5ForCausalLM" in message


def test_a_config_without_architectures_is_not_supported() -> None:
    config = tiny_config(Tiny())
    del config["architectures"]
    assert "supported" in refused(config, UnsupportedArchitecture)


def test_both_forms_are_read() -> None:
    wrapper = architecture_of(tiny_config(Tiny()))
    text_only = architecture_of(tiny_config(Tiny(wrapper=False)))
    assert wrapper.text_prefix == "model.language_model."
    assert text_only.text_prefix == "model."
    assert wrapper.blocks_prefix == "model.language_model.layers"
    assert text_only.block_prefix(2) == "model.layers.2."
    assert wrapper.num_blocks == text_only.num_blocks == 4
    assert text_only.mtp is not None


def test_a_config_without_an_mtp_head_has_none() -> None:
    assert architecture_of(tiny_config(Tiny(mtp=False))).mtp is None
    assert architecture_of(tiny_config(Tiny(text=(("mtp_num_hidden_layers", 0),)))).mtp is None


@pytest.mark.parametrize("layers", [2, -1, "1"])
def test_mtp_heads_of_other_depths_are_not_supported(layers: object) -> None:
    config = tiny_config(Tiny(text=(("mtp_num_hidden_layers", layers),)))
    assert f"mtp_num_hidden_layers {layers!r}" in refused(config, UnsupportedArchitecture)


BROKEN = [
    ("hidden_size", "128"),
    ("hidden_size", None),
    ("hidden_size", 128.5),
    ("hidden_size", -128),
    ("hidden_size", 0),
    ("vocab_size", -1),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 0),
    ("head_dim", 0),
    ("num_hidden_layers", 5),
    ("num_hidden_layers", -4),
    ("layer_types", ["linear_attention"]),
    ("layer_types", ["nonsense"] * 4),
    ("linear_conv_kernel_dim", -1),
    ("hidden_act", "nonsense"),
    ("hidden_act", 3),
    ("rms_norm_eps", "small"),
    ("rope_parameters", 5),
    ("rope_parameters", {"rope_type": "nonsense"}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    ("dtype", "nonsense"),
    ("pad_token_id", 10**6),
]


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("wrapper", [True, False], ids=["wrapper", "text"])
def test_a_broken_value_makes_one_line(wrapper: bool, key: str, value: object) -> None:
    assert "config.json" in refused(tiny_config(Tiny(wrapper=wrapper, text=((key, value),))))


@pytest.mark.parametrize("text_config", [None, [], "text", 3], ids=repr)
def test_a_text_config_that_is_no_object_makes_one_line(text_config: object) -> None:
    assert "config.json" in refused({**tiny_config(Tiny()), "text_config": text_config})


def test_the_head_is_expected_only_where_it_is_not_tied() -> None:
    untied = expected_shapes(architecture_of(tiny_config(Tiny())))
    tied = expected_shapes(architecture_of(tiny_config(Tiny(tied=True))))
    assert untied["lm_head.weight"] == (320, 128)
    assert "lm_head.weight" not in tied
