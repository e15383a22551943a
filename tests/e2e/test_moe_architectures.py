"""Mixtures of experts from a base to a result that loads, judged by transformers' own models."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import VOCAB, read_json, read_weights, tiny_tokenizer, write_weights
from support.moe_checkpoints import (
    BLOCKS,
    EXPERTS,
    HIDDEN,
    PER_TOKEN,
    Moe,
    model_tensors,
    moe_tensors,
    split_experts,
    write_moe,
)
from support.packed import dense as dequantized
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nybble.arch.registry import architecture_of
from nybble.core.errors import CheckpointError
from nybble.data.rows import build_rows
from nybble.engine.load import load_model
from nybble.eval.acceptance import measure_acceptance
from nybble.packing.formats import FORMATS
from nybble.pipeline.algorithms import MIN_TOKENS
from nybble.pipeline.block import Block, MomentCounter, Target
from nybble.pipeline.convert import convert
from nybble.pipeline.quantize import quantize
from nybble.pipeline.streams import Batch
from nybble.quant.grid import IntGrid
from nybble.quant.rtn import rtn
from nybble.recipe.schema import (
    Algorithm,
    Calibration,
    Gptq,
    Override,
    Recipe,
    Rtn,
    Scheme,
    SignRound,
)

QWEN3_5, QWEN3_5_TEXT, NEXT = (
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3NextForCausalLM",
)
FORMS = [
    Moe(QWEN3_5),
    Moe(QWEN3_5, form="one by one", mtp="stacks"),
    Moe(QWEN3_5_TEXT, mtp=None),
    Moe(NEXT, form="one by one"),
    Moe(NEXT, form="stacks", mtp="stacks"),
    Moe(NEXT, form="one by one", mtp=None),
]
TWO = [FORMS[0], FORMS[3]]
"""The form in which each family is published."""
each_form = pytest.mark.parametrize("moe", FORMS, ids=lambda m: f"{m.name} {m.form}, {m.mtp}")
each_family = pytest.mark.parametrize("moe", TWO, ids=["qwen3_5_moe", "qwen3_next"])
GROUP = 32
SCHEME = Scheme(group_size=GROUP)
GRID = IntGrid(4, GROUP, signed_scales=True)
ROWS, SEQLEN = 8, 64


@pytest.fixture(scope="module")
def short_text(text_file: Path) -> Calibration:
    return Calibration(source=str(text_file), rows=ROWS, seqlen=SEQLEN, layout="pack")


def ids(rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(7, VOCAB, (rows, 70), generator=generator)


def reference(folder: Path, moe: Moe, changed: Mapping[str, torch.Tensor] | None = None) -> Any:
    """transformers' model of a base in float32 with some of its weights replaced."""
    loader = AutoModelForImageTextToText if moe.name == QWEN3_5 else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    assert not model.load_state_dict(changed or {}, strict=False).unexpected_keys
    return model.eval().requires_grad_(False)


def quantized_modules(stored: Mapping[str, torch.Tensor]) -> list[str]:
    return [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]


def as_stored(result: Path, moe: Moe) -> dict[str, torch.Tensor]:
    """The weights that a result's codes stand for, under the names of transformers' model."""
    stored = read_weights(result)
    changed = {f"{m}.weight": dequantized(stored, m) for m in quantized_modules(stored)}
    for block in moe.moe_blocks:
        owner = f"{moe.prefix}layers.{block}.mlp.experts"
        parts = {
            part: [changed.pop(f"{owner}.{e}.{part}_proj.weight") for e in range(EXPERTS)]
            for part in ("gate", "up", "down")
        }
        gate_up = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        changed[f"{owner}.gate_up_proj"] = torch.stack(gate_up)
        changed[f"{owner}.down_proj"] = torch.stack(parts["down"])
    return changed


def quant_log(result: Path) -> dict[str, dict[str, str]]:
    """The rows of quant_log.csv by module."""
    with (result / "quant_log.csv").open(encoding="utf-8") as file:
        return {row["module"]: row for row in csv.DictReader(file)}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# --- bases ----------------------------------------------------------------------------------------


@each_form
def test_a_base_computes_what_transformers_computes(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    model = load_model(base)
    expected = reference(base, moe)(input_ids=ids()).logits
    assert torch.allclose(model.logits(model.hidden(ids())), expected, rtol=1e-5, atol=1e-5)
    assert (model.mtp is None) == (moe.mtp is None)


@each_family
def test_drafts_do_not_depend_on_how_the_experts_are_stored(tmp_path: Path, moe: Moe) -> None:
    apart = load_model(write_moe(tmp_path / "apart", Moe(moe.name, mtp="one by one")))
    stacked = load_model(write_moe(tmp_path / "stacked", Moe(moe.name, mtp="stacks")))
    hidden = apart.hidden(ids())
    drafted = apart.drafts(hidden, ids())[0]
    assert drafted.shape == (2, 69, HIDDEN)
    assert torch.equal(drafted, stacked.drafts(hidden, ids())[0])
    assert measure_acceptance(apart, ids()[:, :8], 24).steps > 0


# --- rounded to nearest ---------------------------------------------------------------------------


@each_form
def test_packed_experts_are_their_slices_packed_by_hand(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn(), scheme=SCHEME), "cpu").out
    stored = read_weights(result)
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in model_tensors(moe).items():
        if ".mlp.experts." in name and not name.startswith("mtp."):
            for part, matrix in split_experts(name, tensor).items():
                weight = rtn(matrix, GRID, "minmax")
                expected |= FORMATS["auto_round"].pack(part.removesuffix(".weight"), weight)
    assert len(expected) == len(moe.moe_blocks) * EXPERTS * 3 * 3
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor), name


@each_form
def test_all_else_is_the_bases_byte_for_byte(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn(), scheme=SCHEME), "cpu").out
    originals, stored = moe_tensors(moe), read_weights(result)
    quantized = {f"{module}.weight" for module in quantized_modules(stored)}
    stacks = {n for n in originals if ".experts." in n and not n.startswith("mtp.")}
    kept = {n for n in originals if n not in quantized and n not in stacks}
    assert kept == {n for n in stored if not n.endswith((".qweight", ".qzeros", ".scales"))}
    for name in kept:
        assert same_bits(originals[name], stored[name]), name
    config = read_json(result / "config.json")
    del config["quantization_config"]
    assert config == read_json(base / "config.json")


@each_form
def test_a_result_computes_what_its_codes_stand_for(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn(), scheme=SCHEME), "cpu").out
    model = load_model(result)
    logits = model.logits(model.hidden(ids()))
    expected = reference(base, moe, as_stored(result, moe))(input_ids=ids()).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    before = reference(base, moe)(input_ids=ids()).logits
    assert not torch.allclose(logits, before, atol=0.1)


# --- calibrated -----------------------------------------------------------------------------------


def with_an_idle_expert(folder: Path, moe: Moe) -> Path:
    """A base whose last expert is never chosen: one channel has the same sign for every token."""
    tensors = moe_tensors(moe)
    tensors[f"{moe.prefix}embed_tokens.weight"][:, 0] = 30
    for block in moe.moe_blocks:
        router = tensors[f"{moe.prefix}layers.{block}.mlp.gate.weight"]
        router[:, 0] = 0
        router[-1] = 0
        router[-1, 0] = -8
    return write_moe(folder, moe, tensors)


ALGORITHMS: dict[str, Algorithm] = {
    "gptq": Gptq(),
    "gptq in sequence": Gptq(true_sequential=True, act_order=False),
    "rtn": Rtn(scale_init="importance"),
    "signround": SignRound(iters=2, batch_size=2),
}
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


@each_family
@each_algorithm
def test_calibrated_results_load_and_their_losses_are_distances(
    tmp_path: Path, moe: Moe, algorithm: Algorithm, short_text: Calibration
) -> None:
    base = write_moe(tmp_path / "base", moe)
    recipe = Recipe(algorithm=algorithm, calibration=short_text, scheme=SCHEME)
    result = quantize(base, tmp_path / "out", recipe, "cpu").out
    after = reference(base, moe, as_stored(result, moe))
    model = load_model(result)
    logits = model.logits(model.hidden(ids()))
    assert torch.allclose(logits, after(input_ids=ids()).logits, rtol=1e-5, atol=1e-5)
    log = quant_log(result)
    for block in moe.moe_blocks:
        owner = f"{moe.prefix}layers.{block}.mlp.experts"
        seen = [int(log[f"{owner}.{e}.down_proj"]["tokens"]) for e in range(EXPERTS)]
        assert sum(seen) == PER_TOKEN * ROWS * SEQLEN
        for part in ("gate_proj", "up_proj"):
            assert seen == [int(log[f"{owner}.{e}.{part}"]["tokens"]) for e in range(EXPERTS)]
    if not isinstance(algorithm, SignRound):
        return  # without targets no loss is measured
    rows = build_rows(short_text, tiny_tokenizer()).token_ids
    states = [
        model(input_ids=rows, output_hidden_states=True).hidden_states
        for model in (reference(base, moe), after)
    ]
    for block in range(BLOCKS - 1):  # transformers tells the last one's after the final norm
        expected = float((states[0][block + 1] - states[1][block + 1]).square().mean())
        row = next(row for row in log.values() if int(row["block"]) == block)
        assert float(row["block_loss"]) == pytest.approx(expected, rel=1e-3)


@each_family
def test_gptq_rounds_experts_that_saw_too_little_to_nearest(
    tmp_path: Path, moe: Moe, short_text: Calibration
) -> None:
    base = with_an_idle_expert(tmp_path / "base", moe)
    recipe = Recipe(algorithm=Gptq(scale_init="minmax"), calibration=short_text, scheme=SCHEME)
    result = quantize(base, tmp_path / "out", recipe, "cpu").out
    stored, log = read_weights(result), quant_log(result)
    originals = {n: t for n, t in read_weights(base).items() if not n.startswith("mtp.")}
    stacks = [n for n in originals if n.endswith(("gate_up_proj", "experts.down_proj"))]
    for name in stacks:
        originals |= split_experts(name, originals.pop(name))
    too_few = {module for module, row in log.items() if row["too_few_tokens"] == "1"}
    for module, row in log.items():
        is_expert = ".mlp.experts." in module
        assert (module in too_few) == (is_expert and int(row["tokens"]) < MIN_TOKENS), module
        nearest = rtn(originals[f"{module}.weight"], GRID, "minmax")
        packed = FORMATS["auto_round"].pack(module, nearest)
        is_nearest = all(torch.equal(stored[n], tensor) for n, tensor in packed.items())
        assert is_nearest == (module in too_few), module
    last = f".experts.{EXPERTS - 1}."
    idle = {module for module in too_few if int(log[module]["tokens"]) == 0}
    assert {m for m in log if last in m} == idle
    assert len(idle) == 3 * len(moe.moe_blocks)
    assert all(log[module]["output_error"] == "" for module in too_few)


@each_family
@pytest.mark.parametrize("name", ["rtn", "signround"])
def test_an_idle_expert_takes_the_importance_of_all(
    tmp_path: Path, moe: Moe, name: str, short_text: Calibration
) -> None:
    base = with_an_idle_expert(tmp_path / "base", moe)
    recipe = Recipe(algorithm=ALGORITHMS[name], calibration=short_text, scheme=SCHEME)
    log = quant_log(quantize(base, tmp_path / "out", recipe, "cpu").out)
    idle = [row for row in log.values() if row["tokens"] == "0"]
    assert len(idle) == 3 * len(moe.moe_blocks)
    assert all(row["too_few_tokens"] == "1" for row in idle)
    assert all(float(row["sqnr_db"]) > 10 for row in idle)


def test_padding_reaches_no_experts_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(2, 8, 6, generator=generator)
    block = Block(0, {"e.down_proj": stack}, {"e.down_proj": _target()}, (("e.down_proj",),))
    counter = MomentCounter(block, ("e.down_proj",), full=True, device=torch.device("cpu"))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counter.watch(Batch(torch.zeros(2, 3, 6), mask))
    tokens = {0: torch.tensor([0, 2, 3]), 1: torch.tensor([1, 4, 5])}
    inputs = {expert: torch.randn(3, 6, generator=generator) for expert in tokens}
    for expert, numbers in tokens.items():
        counter.on_input("e.down_proj", expert, inputs[expert], numbers)
    first, second = counter.moments["e.down_proj"]
    assert (first.tokens, second.tokens) == (2, 1)  # tokens 0 and 3; token 1
    real = inputs[0][[0, 2]]
    assert torch.allclose(first.second_moment(), real.T @ real / 2, atol=1e-6)
    assert torch.allclose(second.second_moment(), torch.outer(*inputs[1][[0, 0]]), atol=1e-6)


def _target() -> Target:
    return Target(("e.0.down_proj", "e.1.down_proj"), IntGrid(4, 6, signed_scales=True), "experts")


# --- recipes that keep experts, and formats -------------------------------------------------------


@pytest.mark.parametrize("file_format", ["auto_round", "gptq"])
def test_kept_experts_are_stored_as_loaders_look_for_them(tmp_path: Path, file_format: str) -> None:
    moe = Moe(QWEN3_5)
    base = write_moe(tmp_path / "base", moe)
    keep = Override(match=r"layers\.[02]\.mlp\.experts", keep=True)
    scheme = Scheme(group_size=GROUP, overrides=(keep,))
    recipe = Recipe(algorithm=Rtn(), scheme=scheme, format=file_format)
    result = quantize(base, tmp_path / "out", recipe, "cpu").out
    stored = read_weights(result)
    manifest = read_json(result / "nybble.json")["tensors"]
    for block in (0, 2):
        for part in ("gate_up_proj", "down_proj"):
            name = f"{moe.prefix}layers.{block}.mlp.experts.{part}"
            assert name not in stored
            for apart, matrix in split_experts(name, moe_tensors(moe)[name]).items():
                assert same_bits(stored[apart], matrix), apart
                assert manifest[apart]["fate"] == "kept"
    assert f"{moe.prefix}layers.1.mlp.experts.0.up_proj.qweight" in stored
    computed = load_model(result).hidden(ids())
    assert not torch.allclose(computed, load_model(base).hidden(ids()), atol=0.01)


def test_compressed_tensors_keeps_stacks_as_they_are(tmp_path: Path) -> None:
    moe = Moe(QWEN3_5)
    base = write_moe(tmp_path / "base", moe)
    keep = Override(match=r"layers\.0\.mlp\.experts", keep=True)
    scheme = Scheme(group_size=GROUP, overrides=(keep,))
    recipe = Recipe(algorithm=Rtn(), scheme=scheme, format="compressed-tensors")
    stored = read_weights(quantize(base, tmp_path / "out", recipe, "cpu").out)
    name = f"{moe.prefix}layers.0.mlp.experts.gate_up_proj"
    assert same_bits(stored[name], moe_tensors(moe)[name])
    assert f"{moe.prefix}layers.1.mlp.experts.0.up_proj.weight_packed" in stored


@each_family
def test_all_formats_mean_the_same(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    recipe = Recipe(algorithm=Rtn(), scheme=SCHEME)
    first = quantize(base, tmp_path / "auto_round", recipe, "cpu").out
    expected = load_model(first).hidden(ids())
    for name in ("gptq", "compressed-tensors"):
        made = quantize(base, tmp_path / name, recipe.model_copy(update={"format": name}), "cpu")
        convert(first, tmp_path / f"{name} converted", name)
        for folder in (made.out, tmp_path / f"{name} converted"):
            assert torch.equal(load_model(folder).hidden(ids()), expected)


# --- broken results -------------------------------------------------------------------------------


def test_a_result_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    base = write_moe(tmp_path / "base", Moe(QWEN3_5))
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn(), scheme=SCHEME), "cpu").out
    tensors = read_weights(result)
    lost = "model.language_model.layers.1.mlp.experts.2.up_proj"
    for suffix in ("qweight", "qzeros", "scales"):
        del tensors[f"{lost}.{suffix}"]
    write_weights(result, tensors)
    with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
        load_model(result)


@each_family
def test_a_result_is_of_the_same_architecture(tmp_path: Path, moe: Moe) -> None:
    base = write_moe(tmp_path / "base", moe)
    result = quantize(base, tmp_path / "out", Recipe(algorithm=Rtn(), scheme=SCHEME), "cpu").out
    arch = architecture_of(read_json(result / "config.json"))
    assert arch.experts is not None
    assert arch.experts.count == EXPERTS
