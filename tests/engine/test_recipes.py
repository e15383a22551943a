"""Every shipped recipe, scaled down, gives a checkpoint that the real loaders read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.engine.load import load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe, shipped_recipes

QUANTIZED = re.compile(
    r".*(self_attn\.[qkvo]_proj|in_proj_(qkv|z)|out_proj|mlp\.(gate|up|down)_proj)$"
)
SCALED_DOWN = (
    "calibration.source=stdlib",
    "calibration.layout=pack",
    "calibration.rows=8",
    "calibration.seqlen=64",
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_transformers_reads_it(
    tiny: Path,
    tmp_path: Path,
    loader_ids: torch.Tensor,
    run_transformers: Callable[[Path, str, str], tuple[dict[str, Any], Path]],
    name: str,
) -> None:
    few_steps = ["algorithm.iters=2"] if hasattr(load_recipe(name).algorithm, "iters") else []
    recipe = load_recipe(name, [*SCALED_DOWN, *few_steps])
    out = quantize(tiny, tmp_path / "out", recipe, "cpu").out
    loaded = run_transformers(out, "AutoModelForImageTextToText", recipe.format)
    found, logits_file = loaded
    assert found["missing_keys"] == found["unexpected_keys"] == []
    kept = [override.match for override in recipe.scheme.overrides if override.keep]
    for module, linear in found["linears"].items():
        is_kept = any(re.search(pattern, module) for pattern in kept)
        assert linear["packed"] == (bool(QUANTIZED.match(module)) and not is_kept), module
    model = load_model(out, dtype=torch.bfloat16)
    difference = model.logits(model.hidden(loader_ids)) - load_file(logits_file)["logits"]
    assert float(difference.square().mean().sqrt()) < 0.03  # of a spread of about 3


@pytest.mark.parametrize("format_name", ["auto_round", "compressed-tensors"])
def test_int4_recipes_declare_what_vllm_was_seen_to_load(
    tiny: Path,
    tiny_int4: Path,
    in_format: Callable[[Path, str], Path],
    tmp_path: Path,
    format_name: str,
) -> None:
    # test_vllm.py has vLLM load tiny_int4 in every format; vLLM's CPU build has no INT8.
    def declared(folder: Path) -> Any:
        return json.loads((folder / "config.json").read_text())["quantization_config"]

    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    names = [n for n, r in recipes.items() if (r.scheme.bits, r.format) == (4, format_name)]
    assert names
    for name in names:
        rounded = load_recipe(name, [*SCALED_DOWN, "algorithm.name=rtn"])
        out = quantize(tiny, tmp_path / name, rounded, "cpu").out
        assert declared(out) == declared(in_format(tiny_int4, format_name))
