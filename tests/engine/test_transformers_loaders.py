"""Transformers, through the loader of each format, computes what we say the checkpoint means."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.engine.load import load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe

RunTransformers = Callable[[Path, str, str], tuple[dict[str, Any], Path]]
MakePacked = Callable[..., Path]

CAUSAL, MULTIMODAL = "AutoModelForCausalLM", "AutoModelForImageTextToText"
QUANTIZED = re.compile(
    r".*(self_attn\.[qkvo]_proj|in_proj_(qkv|z)|out_proj|mlp\.(gate|up|down)_proj)$"
)
LOADERS = {  # the formats, and who else reads them
    "auto_round": "auto_round",
    "compressed-tensors": "compressed-tensors",
    "optimum": "gptq",
    "auto_round reads gptq": "gptq",
}
# Every width that packs otherwise, in one checkpoint; fused modules agree.
MIXED_WIDTHS = (
    'scheme.overrides=[{match="mlp.(gate|up)_proj",bits=8},'
    '{match="down_proj",bits=2},{match="out_proj",bits=3}]'
)


@pytest.fixture(scope="session")
def packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> MakePacked:
    """(format, override) -> the bundled model rounded to nearest; each is made once."""
    folder = tmp_path_factory.mktemp("packed")
    made: dict[tuple[str, ...], Path] = {}

    def make(format_name: str, *overrides: str) -> Path:
        key = (format_name, *overrides)
        if key not in made:
            made[key] = folder / str(len(made))
            recipe = load_recipe("w4a16-rtn", [f"format={format_name}", *overrides])
            quantize(tiny, made[key], recipe, "cpu")
        return made[key]

    return make


def check(
    checkpoint: Path, token_ids: torch.Tensor, found: dict[str, Any], logits_file: Path
) -> None:
    """Keys and modules are as they should be, and logits as near to exact ones as ours are."""
    assert found["missing_keys"] == []
    # AutoRound has no use for the indices of groups that gptq checkpoints carry for others.
    assert [name for name in found["unexpected_keys"] if not name.endswith(".g_idx")] == []
    assert len(found["linears"]) == 31
    for name, linear in found["linears"].items():
        assert linear["packed"] == bool(QUANTIZED.match(name)), name
    theirs = load_file(logits_file)["logits"]
    ours, exact = (
        model.logits(model.hidden(token_ids))
        for model in (load_model(checkpoint, dtype=torch.bfloat16), load_model(checkpoint))
    )
    # In bfloat16 each order of a sum rounds otherwise: equal logits cannot be asked of all loaders.
    assert distance(theirs, exact) < 1.25 * distance(ours, exact)


def distance(logits: torch.Tensor, other: torch.Tensor) -> float:
    """Root of the mean squared difference."""
    return float((logits - other).square().mean().sqrt())


@pytest.mark.parametrize("auto_class", [MULTIMODAL, CAUSAL])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_key_matches_and_logits_are_ours(
    packed: MakePacked,
    loader_ids: torch.Tensor,
    run_transformers: RunTransformers,
    loader: str,
    auto_class: str,
) -> None:
    checkpoint = packed(LOADERS[loader])
    check(checkpoint, loader_ids, *run_transformers(checkpoint, auto_class, loader))


# Not optimum: it does not read `dynamic`, the place for further grids.
@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "optimum"])
def test_every_width_is_read(
    packed: MakePacked, loader_ids: torch.Tensor, run_transformers: RunTransformers, loader: str
) -> None:
    checkpoint = packed(LOADERS[loader], MIXED_WIDTHS)
    check(checkpoint, loader_ids, *run_transformers(checkpoint, CAUSAL, loader))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_every_width_is_read_by_optimum(
    packed: MakePacked, loader_ids: torch.Tensor, run_transformers: RunTransformers, bits: int
) -> None:
    checkpoint = packed("gptq", f"scheme.bits={bits}")
    check(checkpoint, loader_ids, *run_transformers(checkpoint, CAUSAL, "optimum"))


@pytest.mark.parametrize("auto_class", [MULTIMODAL, CAUSAL])
def test_signround_result_is_read(
    tiny_int4: Path, loader_ids: torch.Tensor, run_transformers: RunTransformers, auto_class: str
) -> None:
    check(tiny_int4, loader_ids, *run_transformers(tiny_int4, auto_class, "auto_round"))
