"""Every scheme in every format: what is stored is what was asked for, and it computes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import (
    MTP_SHAPES,
    VOCAB,
    Tiny,
    quantized_modules,
    read_json,
    read_weights,
)
from support.packed import codes_and_scales, dense

from nybble.core.errors import NybbleError, RecipeError
from nybble.engine.load import LoadedModel, load_model
from nybble.packing.formats import FORMATS
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import (
    Calibration,
    Format,
    Gptq,
    Override,
    Recipe,
    Rtn,
    Scheme,
    SignRound,
)

LAYERS = f"{Tiny().prefix}layers"
TRUNK = quantized_modules(Tiny().prefix)
MTP_LINEARS = {
    name.removesuffix(".weight")
    for name, shape in MTP_SHAPES.items()
    if name.startswith("mtp.layers.") and len(shape) == 2
}
ATTENTION = {module for module in TRUNK if ".self_attn." in module}
KEEP_ATTENTION = Override(match=r"\.self_attn\.", keep=True)
WIDE_DOWN = Override(match=r"\.down_proj$", bits=8, group_size=-1)
FIRST_KEPT = Override(match=r"layers\.0\.", keep=True)
DOWN = {module for module in TRUNK if module.endswith("down_proj")}
FIRST = {module for module in TRUNK if module.startswith(f"{LAYERS}.0.")}


@dataclass(frozen=True)
class Case:
    """A scheme, and the bits of every Linear that it quantizes."""

    scheme: Scheme
    bits: Mapping[str, int]


CASES = {
    "W2": Case(Scheme(bits=2, group_size=32), dict.fromkeys(TRUNK, 2)),
    "W3": Case(Scheme(bits=3), dict.fromkeys(TRUNK, 3)),
    "W4": Case(Scheme(), dict.fromkeys(TRUNK, 4)),
    "W8 per channel": Case(Scheme(bits=8, group_size=-1), dict.fromkeys(TRUNK, 8)),
    "MTP W4": Case(Scheme(mtp_bits=4), dict.fromkeys(TRUNK | MTP_LINEARS, 4)),
    "MTP W8": Case(Scheme(mtp_bits=8), dict.fromkeys(TRUNK, 4) | dict.fromkeys(MTP_LINEARS, 8)),
    "lm_head W8": Case(Scheme(lm_head_bits=8), dict.fromkeys(TRUNK, 4) | {"lm_head": 8}),
    "attention kept": Case(
        Scheme(overrides=(KEEP_ATTENTION,)), dict.fromkeys(TRUNK - ATTENTION, 4)
    ),
    "first block kept": Case(Scheme(overrides=(FIRST_KEPT,)), dict.fromkeys(TRUNK - FIRST, 4)),
    "all at once": Case(
        Scheme(
            bits=3,
            group_size=64,
            lm_head_bits=4,
            mtp_bits=8,
            overrides=(KEEP_ATTENTION, WIDE_DOWN),
        ),
        dict.fromkeys(TRUNK - ATTENTION, 3) | dict.fromkeys(DOWN | MTP_LINEARS, 8) | {"lm_head": 4},
    ),
}
FORMAT_NAMES = sorted(FORMATS)
Quantized = Callable[[Recipe], Path]


@pytest.fixture(scope="module")
def quantized(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """The tiny checkpoint by some recipe; each is made once and not to be changed."""
    made: dict[Recipe, Path] = {}

    def by(recipe: Recipe) -> Path:
        if recipe not in made:
            out = tmp_path_factory.mktemp("scheme") / "out"
            made[recipe] = quantize(tiny_base, out, recipe, "cpu").out
        return made[recipe]

    return by


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> LoadedModel:
    return load_model(tiny_base)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def data_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "quant_log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("file_format", FORMAT_NAMES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_is_what_was_asked_for(
    quantized: Quantized, tiny_base: Path, name: str, file_format: Format
) -> None:
    case = CASES[name]
    out = quantized(Recipe(scheme=case.scheme, algorithm=Rtn(), format=file_format))
    source, stored = read_weights(tiny_base), read_weights(out)
    kept = {tensor for tensor in source if tensor.removesuffix(".weight") not in case.bits}
    assert "mtp.fc.weight" in kept
    for tensor in kept:
        assert data_of(source[tensor]) == data_of(stored[tensor]), tensor
    suffixes = FORMATS[file_format].suffixes
    assert set(stored) == kept | {f"{m}.{suffix}" for m in case.bits for suffix in suffixes}
    for module, bits in case.bits.items():
        weight = source[f"{module}.weight"].double().numpy()
        codes, scales = codes_and_scales(stored, module, bits)
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert lowest <= codes.min() < codes.max() <= highest
        nearest = np.round(weight / scales).clip(lowest, highest)
        assert (nearest == codes).mean() > 0.999, module


@pytest.mark.parametrize("file_format", FORMAT_NAMES)
@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_is_what_is_loaded(
    quantized: Quantized, tiny_base: Path, name: str, file_format: Format
) -> None:
    case = CASES[name]
    out = quantized(Recipe(scheme=case.scheme, algorithm=Rtn(), format=file_format))
    source, stored, model = read_weights(tiny_base), read_weights(out), load_model(out)
    assert model.mtp is not None
    loaded = {f"{Tiny().prefix}{n}": w for n, w in model.trunk.state_dict().items()}
    loaded |= {f"mtp.{n}": w for n, w in model.mtp.state_dict().items()}
    loaded["lm_head.weight"] = model.lm_head
    for tensor, weight in loaded.items():
        module = tensor.removesuffix(".weight")
        bits = case.bits.get(module)
        expected = dense(stored, module, bits) if bits else source[tensor].float()
        assert torch.equal(weight, expected), tensor


@pytest.mark.parametrize("name", ["MTP W4", "MTP W8"])
@pytest.mark.parametrize("algorithm", [Rtn(), Gptq(), SignRound(iters=4, batch_size=4)], ids=str)
def test_a_quantized_mtp_layer_drafts_like_the_bases(
    quantized: Quantized,
    calibration: Calibration,
    base: LoadedModel,
    ids: torch.Tensor,
    algorithm: Rtn | Gptq | SignRound,
    name: str,
) -> None:
    """Random weights: the trunk's own error is large, so both heads are given the same states."""
    recipe = Recipe(scheme=CASES[name].scheme, algorithm=algorithm, calibration=calibration)
    model = load_model(quantized(recipe))
    hidden = base.hidden(ids)
    drafts = [one.logits(one.drafts(hidden, ids)[0]) for one in (base, model)]
    similarity = torch.nn.functional.cosine_similarity(*drafts, dim=-1)
    assert float(similarity.mean()) > (0.999 if name == "MTP W8" else 0.97)
    assert not torch.equal(*drafts)
    blocks = {row["module"]: row["block"] for row in log_of(quantized(recipe))}
    assert {module for module, block in blocks.items() if block == "4"} == MTP_LINEARS


@pytest.mark.parametrize("algorithm", [Rtn(), Gptq(), SignRound(iters=4, batch_size=4)], ids=str)
def test_a_quantized_output_head_answers_like_the_bases(
    quantized: Quantized,
    calibration: Calibration,
    base: LoadedModel,
    ids: torch.Tensor,
    algorithm: Rtn | Gptq | SignRound,
) -> None:
    scheme = CASES["lm_head W8"].scheme
    out = quantized(Recipe(scheme=scheme, algorithm=algorithm, calibration=calibration))
    hidden = base.hidden(ids)
    expected, found = base.logits(hidden), load_model(out).logits(hidden)
    assert 0 < float((found - expected).square().mean() / expected.square().mean()) < 1e-4
    row = log_of(out)[-1]
    assert (row["module"], row["part"], row["bits"], row["block"]) == (
        "lm_head",
        "lm_head",
        "8",
        "5",
    )


@pytest.mark.parametrize("algorithm", [Gptq(), SignRound(iters=4, batch_size=4)], ids=str)
@pytest.mark.parametrize("name", ["attention kept", "first block kept", "all at once"])
def test_a_mixed_scheme_works_with_every_algorithm(
    quantized: Quantized,
    calibration: Calibration,
    name: str,
    algorithm: Gptq | SignRound,
) -> None:
    case = CASES[name]
    recipe = Recipe(
        scheme=case.scheme,
        algorithm=algorithm,
        calibration=calibration,
        format="compressed-tensors",
    )
    rows = log_of(quantized(recipe))
    assert {row["module"]: int(row["bits"]) for row in rows} == case.bits
    hashes = read_json(quantized(recipe) / "nybble.json")["base"]["quantized_tensors_sha256"]
    assert set(hashes) == {f"{module}.weight" for module in case.bits}


def test_a_scheme_that_keeps_every_block_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    scheme = Scheme(overrides=(Override(match=".", keep=True),))
    with pytest.raises(RecipeError, match="keeps every Linear"):
        quantize(tiny_base, tmp_path / "out", Recipe(scheme=scheme, algorithm=Rtn()), "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_mixed_mtp_layer_is_no_matter_of_overrides(tiny_base: Path, tmp_path: Path) -> None:
    scheme = Scheme(mtp_bits=4, overrides=(Override(match=r"mtp\..*down_proj", bits=8),))
    with pytest.raises(NybbleError, match=r"scheme\.mtp_bits"):
        quantize(tiny_base, tmp_path / "out", Recipe(scheme=scheme, algorithm=Rtn()), "cpu")
