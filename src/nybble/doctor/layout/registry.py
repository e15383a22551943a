"""From a config.json to the layout of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nybble.doctor.layout.dense import (
    GEMMA3,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    dense_layout,
    gemma3_wrapper_layout,
)
from nybble.doctor.layout.gated_delta import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    gated_delta_layout,
)
from nybble.doctor.layout.spec import Layout

_LAYOUTS: dict[str, Callable[[str, Mapping[str, Any]], Layout]] = {
    "Qwen3_5ForConditionalGeneration": partial(gated_delta_layout, QWEN3_5),
    "Qwen3_5ForCausalLM": partial(gated_delta_layout, QWEN3_5),
    "Qwen3_5MoeForConditionalGeneration": partial(gated_delta_layout, QWEN3_5_MOE),
    "Qwen3_5MoeForCausalLM": partial(gated_delta_layout, QWEN3_5_MOE),
    "Qwen3NextForCausalLM": partial(gated_delta_layout, QWEN3_NEXT),
    "LlamaForCausalLM": partial(dense_layout, LLAMA),
    "MistralForCausalLM": partial(dense_layout, MISTRAL),
    "Qwen2ForCausalLM": partial(dense_layout, QWEN2),
    "Qwen3ForCausalLM": partial(dense_layout, QWEN3),
    "Gemma3ForCausalLM": partial(dense_layout, GEMMA3),
    "Gemma3ForConditionalGeneration": gemma3_wrapper_layout,
}
"""By the first of config.json's ``architectures``."""


def layout_of(config: Mapping[str, Any]) -> Layout | None:
    """The layout of the model that a config.json describes; None for an unknown architecture.

    Raises CheckpointError, one line, for a value that is missing, of a wrong type or absurd.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in _LAYOUTS:
        return None
    return _LAYOUTS[name](name, config)
