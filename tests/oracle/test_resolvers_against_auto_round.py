"""The reading of AutoRound's declaration by Transformers against auto-round's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.declarations import (
    BF16,
    PORTABLE_EXTRA,
    TRANSFORMERS,
    TRUNK,
    context,
    inc,
    wrapper_layout,
)
from transformers import AutoRoundConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.auto_round import AUTO_ROUND
from nybble.doctor.resolve.built import DENSE, Built, Scheme, Storage

TINY = Path(__file__).parents[2] / "src/nybble/assets/tiny/config.json"
LAYER_0 = f"{TRUNK}.0"
WIDE = {"bits": 8, "group_size": 64, "sym": True}
BLOCKS = [
    inc(block_name_to_quantize=TRUNK),
    inc(block_name_to_quantize=TRUNK, extra_config=PORTABLE_EXTRA),
    inc(to_quant_block_names=[[f"{TRUNK}.0", f"{TRUNK}.1"]]),
    inc(block_name_to_quantize=f"{TRUNK},model.visual.blocks,lm_head"),
    inc(block_name_to_quantize="model.layers"),
    inc(),
    inc(extra_config={f"{LAYER_0}.mlp.down_proj": {"group_size": 32}, "lm_head": WIDE}),
    inc(extra_config={f"{LAYER_0}.mlp": WIDE, ".*o_proj": BF16, "(": BF16, "down_proj": {}}),
    inc(block_name_to_quantize=TRUNK, extra_config={"visual.blocks.0.mlp": WIDE, "mtp": BF16}),
    inc(extra_config={".*up_proj": WIDE, ".*(gate|up)_proj": BF16}),
    inc(modules_to_not_convert=["down_proj"], extra_config={f"{LAYER_0}.mlp.down_proj": WIDE}),
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """The bundled model without weights."""
    values = json.loads(TINY.read_text())
    with torch.device("meta"):
        return Qwen3_5ForConditionalGeneration(Qwen3_5Config.from_dict(values))


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=lambda number: f"block-{number}")
def test_what_is_quantized_is_what_auto_round_quantizes(
    model: torch.nn.Module, number: int
) -> None:
    convert_model = pytest.importorskip("auto_round.inference.convert_model")
    block = BLOCKS[number]
    model.config.quantization_config = AutoRoundConfig.from_dict(copy.deepcopy(block))
    theirs = convert_model.get_layer_config(model, model.config.quantization_config)
    layout = wrapper_layout()
    assert AUTO_ROUND.refusal(context(block, TRANSFORMERS, layout=layout)) is None
    assert _ours(layout, block) == _expected(model, theirs)


def _ours(layout: Layout, block: dict[str, Any]) -> dict[str, Built]:
    found = context(block, TRANSFORMERS, layout=layout)
    return {
        module.name: AUTO_ROUND.resolve(found, module) for module in modules(layout, TRANSFORMERS)
    }


def _expected(model: torch.nn.Module, theirs: dict[str, Any]) -> dict[str, Scheme]:
    """By the layers' configs; what 32 does not divide gets a stand-in with a dense weight."""
    expected = {}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        config = theirs.get(name)
        is_odd = module.in_features % 32 or module.out_features % 32
        if config is None or config["bits"] > 8 or is_odd:
            expected[name] = DENSE
            continue
        group = config["group_size"]
        fits = module.in_features % group == 0
        expected[name] = (
            Scheme(Storage.GPTQ, config["bits"], group, config["sym"]) if fits else DENSE
        )
    return expected
