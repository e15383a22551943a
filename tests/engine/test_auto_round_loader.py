"""Transformers, through AutoRound's own loader, computes what we say the checkpoint means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.engine.load import load_model

QUANTIZED = re.compile(
    r".*(self_attn\.[qkvo]_proj|in_proj_(qkv|z)|out_proj|mlp\.(gate|up|down)_proj)$"
)


@pytest.mark.parametrize("auto_class", ["AutoModelForImageTextToText", "AutoModelForCausalLM"])
def test_every_key_matches_and_logits_are_ours(
    tiny_int4: Path,
    heldout_prompts: torch.Tensor,
    run_auto_round: Callable[[Path, str], tuple[dict[str, Any], Path]],
    auto_class: str,
) -> None:
    found, logits_file = run_auto_round(tiny_int4, auto_class)
    assert found["missing_keys"] == []
    assert found["unexpected_keys"] == []
    for name, kind in found["linears"].items():
        assert kind == ("QuantLinear" if QUANTIZED.match(name) else "Linear"), name
    model = load_model(tiny_int4, dtype=torch.bfloat16)
    ours = model.logits(model.hidden(heldout_prompts[:2]))
    theirs = load_file(logits_file)["logits"]
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-5)  # a few bfloat16 steps
