"""What random weights cannot show: how well a trained model and its MTP head still answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.demo import bundled_model
from nybble.engine.load import LoadedModel, load_model
from nybble.eval.acceptance import measure_acceptance
from nybble.eval.kld import measure_kld
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Gptq, Recipe, Rtn, Scheme, SignRound


@pytest.fixture(scope="module")
def bundled() -> Iterator[Path]:
    with bundled_model() as folder:
        yield folder


@pytest.fixture(scope="module")
def base(bundled: Path) -> LoadedModel:
    return load_model(bundled)


@pytest.fixture(scope="module")
def windows(bundled: Path) -> torch.Tensor:
    """Text that neither the model nor the recipes below have seen."""
    tokenizer = AutoTokenizer.from_pretrained(bundled, local_files_only=True)
    heldout = Calibration(source="stdlib-heldout", rows=16, seqlen=128, layout="pack", seed=5)
    return build_rows(heldout, tokenizer).token_ids


@pytest.fixture(scope="module")
def quantized(
    bundled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Recipe], LoadedModel]:
    def by(recipe: Recipe) -> LoadedModel:
        out = tmp_path_factory.mktemp("bundled") / "out"
        return load_model(quantize(bundled, out, recipe, "cpu").out)

    return by


Quantized = Callable[[Recipe], LoadedModel]
FEW = Calibration(source="stdlib", rows=16, seqlen=96, layout="pack")


@pytest.fixture(scope="module")
def trained(quantized: Quantized) -> LoadedModel:
    return quantized(Recipe(algorithm=SignRound(iters=24, batch_size=4), calibration=FEW))


@pytest.fixture(scope="module")
def rounded(quantized: Quantized) -> LoadedModel:
    return quantized(Recipe(algorithm=Rtn()))


@pytest.fixture(scope="module")
def compensated(quantized: Quantized) -> LoadedModel:
    """By GPTQ, the MTP layer and the output head as well."""
    text = Calibration(source="stdlib", rows=24, seqlen=128, layout="pack")
    scheme = Scheme(mtp_bits=4, lm_head_bits=8)
    return quantized(Recipe(scheme=scheme, algorithm=Gptq(), calibration=text))


def test_a_quantized_trunk_accepts_nearly_as_many_drafts(
    base: LoadedModel, trained: LoadedModel, windows: torch.Tensor
) -> None:
    prompts = windows[:, :48]
    before, after = (measure_acceptance(m, prompts, 48).rate for m in (base, trained))
    assert before > 0.5
    assert after > 0.8 * before


def test_a_lost_mtp_head_would_be_noticed(base: LoadedModel, windows: torch.Tensor) -> None:
    """What happens elsewhere: the head's tensors are missing and it drafts from noise."""
    assert base.mtp is not None
    lost = LoadedModel(base.arch, base.trunk, base.lm_head, base.arch.mtp.build().eval())
    torch.manual_seed(0)
    for parameter in lost.mtp.to_empty(device="cpu").parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert measure_acceptance(lost, windows[:4, :48], 32).rate < 0.05


def test_training_loses_less_than_rounding(
    base: LoadedModel, trained: LoadedModel, rounded: LoadedModel, windows: torch.Tensor
) -> None:
    lost, lost_by_rounding = (measure_kld(base, model, windows) for model in (trained, rounded))
    assert 0 < lost.mean < lost_by_rounding.mean
    assert lost.top1_agreement > 0.85
    assert lost.candidate_perplexity < 1.1 * lost.base_perplexity


def test_gptq_loses_less_than_rounding(
    base: LoadedModel, compensated: LoadedModel, rounded: LoadedModel, windows: torch.Tensor
) -> None:
    lost, lost_by_rounding = (measure_kld(base, model, windows) for model in (compensated, rounded))
    assert 0 < lost.mean <= 0.8 * lost_by_rounding.mean
    assert lost.top1_agreement > 0.9


def test_a_quantized_mtp_layer_accepts_nearly_as_many_drafts(
    base: LoadedModel, compensated: LoadedModel, windows: torch.Tensor
) -> None:
    prompts = windows[:, :48]
    before, after = (measure_acceptance(m, prompts, 48).rate for m in (base, compensated))
    assert after > 0.8 * before


def test_eight_bits_lose_next_to_nothing(
    base: LoadedModel, quantized: Quantized, windows: torch.Tensor
) -> None:
    wide = quantized(Recipe(scheme=Scheme(bits=8), algorithm=Rtn()))
    lost = measure_kld(base, wide, windows)
    assert 0 < lost.mean <= 1e-4
    assert lost.top1_agreement > 0.99
