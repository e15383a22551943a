"""Dense families from a base to a result that loads, judged by transformers' own models."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCAB, read_json, read_weights, tiny_tokenizer
from support.dense_checkpoints import (
    CONFIGS,
    WINDOW,
    Dense,
    dense_tensors,
    stored_by_transformers_4,
    write_dense,
    write_weights,
)
from support.packed import dense as dequantized
from transformers import AutoModelForCausalLM

from nybble.core.errors import CheckpointError
from nybble.data.rows import build_rows
from nybble.engine.load import load_model
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Recipe, Rtn, SignRound

TIED_QWEN2 = Dense("Qwen2ForCausalLM", (("tie_word_embeddings", True),))
BIASED_LLAMA = Dense("LlamaForCausalLM", (("attention_bias", True), ("mlp_bias", True)))
UNTIED_GEMMA3 = Dense("Gemma3ForConditionalGeneration", (("tie_word_embeddings", False),))
VARIANTS = {
    **{name: Dense(name) for name in CONFIGS},
    "Qwen2 tied": TIED_QWEN2,
    "Llama with biases": BIASED_LLAMA,
    "Gemma3 wrapper untied": UNTIED_GEMMA3,
}
BLOCKS, LINEARS = 3, 7
each_variant = pytest.mark.parametrize("dense", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def short_text(text_file: Path) -> Calibration:
    """Rows longer than the windows."""
    return Calibration(source=str(text_file), rows=4, seqlen=2 * WINDOW + 8, layout="pack")


def quantized_modules(stored: Mapping[str, torch.Tensor]) -> list[str]:
    return [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]


def reference(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Any:
    """transformers' model in float32 with some of its weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    return model.eval().requires_grad_(False)


def as_stored(base: Path, result: Path) -> Any:
    """transformers' model of the base with the weights that the result's codes stand for."""
    stored = read_weights(result)
    modules = quantized_modules(stored)
    return reference(base, {f"{m}.weight": dequantized(stored, m) for m in modules})


def ids() -> torch.Tensor:
    return torch.randint(7, VOCAB, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))


def check_result(base: Path, result: Path, dense: Dense) -> None:
    """Everything kept is the base's, and the rest is what transformers computes with it."""
    originals, stored = dense_tensors(dense), read_weights(result)
    modules = quantized_modules(stored)
    assert len(modules) == BLOCKS * LINEARS
    kept = {n for n in originals if n.removesuffix(".weight") not in modules}
    packed = {f"{m}.{suffix}" for m in modules for suffix in ("qweight", "qzeros", "scales")}
    assert set(stored) == kept | packed
    for name in kept:
        assert originals[name].dtype == stored[name].dtype, name
        assert torch.equal(originals[name].view(torch.int16), stored[name].view(torch.int16)), name
    model = load_model(result)
    logits = model.logits(model.hidden(ids()))
    expected = as_stored(base, result)(input_ids=ids()).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    similarity = torch.nn.functional.cosine_similarity(
        logits, reference(base, {})(input_ids=ids()).logits, dim=-1
    )
    assert 0.9 < float(similarity.mean()) < 0.9999


@each_variant
def test_rounded_to_nearest(tmp_path: Path, dense: Dense) -> None:
    base = write_dense(tmp_path / "base", dense)
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn()), "cpu").out
    check_result(base, result, dense)
    config = read_json(result / "config.json")
    quantization = config.pop("quantization_config")
    assert config == read_json(base / "config.json")
    wrapper = dense.name == "Gemma3ForConditionalGeneration"
    expected = "model.language_model.layers" if wrapper else "model.layers"
    assert quantization["block_name_to_quantize"] == expected


@each_variant
def test_rounding_learned_on_the_models_own_hidden_states(
    tmp_path: Path, dense: Dense, short_text: Calibration
) -> None:
    base = write_dense(tmp_path / "base", dense)
    recipe = Recipe(algorithm=SignRound(iters=2, batch_size=2), calibration=short_text)
    result = quantize(base, tmp_path / "out", recipe, "cpu").out
    check_result(base, result, dense)
    # The streams are the hidden states of the two models: the log's losses are their distances.
    rows = build_rows(short_text, tiny_tokenizer()).token_ids
    before, after = (
        model(input_ids=rows, output_hidden_states=True).hidden_states
        for model in (reference(base, {}), as_stored(base, result))
    )
    with (result / "quant_log.csv").open(encoding="utf-8") as file:
        losses = {int(row["block"]): float(row["block_loss"]) for row in csv.DictReader(file)}
    assert sorted(losses) == list(range(BLOCKS))
    for block in range(BLOCKS - 1):  # transformers tells the last one's after the final norm
        expected = float((before[block + 1] - after[block + 1]).square().mean())
        assert losses[block] == pytest.approx(expected, rel=1e-3)
        assert expected > 0


def test_biases_are_there_and_survive(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base", Dense("Qwen2ForCausalLM"))
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn()), "cpu").out
    originals, stored = read_weights(base), read_weights(result)
    biases = [name for name in stored if name.endswith(".bias")]
    assert len(biases) == 3 * BLOCKS
    for name in biases:
        assert torch.equal(originals[name].view(torch.int16), stored[name].view(torch.int16))
        assert bool((stored[name] != 0).any())


def test_a_gemma_under_the_hubs_names_is_refused_with_advice(tmp_path: Path) -> None:
    dense = Dense("Gemma3ForConditionalGeneration")
    base = write_dense(tmp_path / "base", dense)
    write_weights(base, stored_by_transformers_4(dense_tensors(dense)))
    with pytest.raises(CheckpointError, match="save_original_format=False"):
        quantize(base, tmp_path / "out", Recipe(algorithm=Rtn()), "cpu")
    assert not (tmp_path / "out").exists()
