"""The one thing random weights cannot show: that a trained MTP head still drafts well."""

from __future__ import annotations

from collections.abc import Iterator
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
from nybble.recipe.schema import Calibration, Recipe, Rtn, SignRound


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
def trained(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    recipe = Recipe(
        algorithm=SignRound(iters=24, batch_size=4),
        calibration=Calibration(source="stdlib", rows=16, seqlen=96, layout="pack"),
    )
    return load_model(quantize(bundled, tmp_path_factory.mktemp("s") / "out", recipe, "cpu").out)


@pytest.fixture(scope="module")
def rounded(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    recipe = Recipe(algorithm=Rtn())
    return load_model(quantize(bundled, tmp_path_factory.mktemp("r") / "out", recipe, "cpu").out)


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
