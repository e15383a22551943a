"""What random weights cannot show: how well a trained model and its MTP head still answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.outputs import pieces_of
from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.demo import bundled_model
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.stream import Arithmetic
from nybble.eval.acceptance import measure_acceptance
from nybble.eval.compare import compare
from nybble.eval.kld import Scores, kl_divergence
from nybble.eval.statistics import KldStatistics, statistics
from nybble.pipeline.quantize import quantize
from nybble.recipe.schema import Calibration, Gptq, Recipe, Rtn, Scheme, SignRound

HOW = Arithmetic(torch.device("cpu"))
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""Of one position's divergence, in float32."""


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
def quantized(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """Folder of the bundled model quantized by a recipe."""

    def by(recipe: Recipe) -> Path:
        out = tmp_path_factory.mktemp("bundled") / "out"
        return quantize(bundled, out, recipe, "cpu").out

    return by


@pytest.fixture(scope="module")
def lost(bundled: Path, windows: torch.Tensor) -> Callable[[Path], KldStatistics]:
    """How far a checkpoint is from the bundled one; each is measured once."""
    found: dict[Path, KldStatistics] = {}

    def measured(folder: Path) -> KldStatistics:
        if folder not in found:
            found[folder] = statistics(compare(bundled, folder, windows, HOW))
        return found[folder]

    return measured


Quantized = Callable[[Recipe], Path]
Lost = Callable[[Path], KldStatistics]
FEW = Calibration(source="stdlib", rows=16, seqlen=96, layout="pack")


@pytest.fixture(scope="module")
def trained(quantized: Quantized) -> Path:
    return quantized(Recipe(algorithm=SignRound(iters=24, batch_size=4), calibration=FEW))


@pytest.fixture(scope="module")
def rounded(quantized: Quantized) -> Path:
    return quantized(Recipe(algorithm=Rtn()))


@pytest.fixture(scope="module")
def wide(quantized: Quantized) -> Path:
    return quantized(Recipe(scheme=Scheme(bits=8), algorithm=Rtn()))


@pytest.fixture(scope="module")
def compensated(quantized: Quantized) -> Path:
    """By GPTQ, the MTP layer and the output head as well."""
    text = Calibration(source="stdlib", rows=24, seqlen=128, layout="pack")
    scheme = Scheme(mtp_bits=4, lm_head_bits=8)
    return quantized(Recipe(scheme=scheme, algorithm=Gptq(), calibration=text))


def test_a_quantized_trunk_accepts_nearly_as_many_drafts(
    base: LoadedModel, trained: Path, windows: torch.Tensor
) -> None:
    prompts = windows[:, :48]
    before, after = (measure_acceptance(m, prompts, 48, 3) for m in (base, load_model(trained)))
    assert before.rates[0] > 0.5
    for kept, rate in zip(after.rates, before.rates, strict=True):
        assert kept > 0.8 * rate
    assert before.rates[0] > before.rates[1] > before.rates[2] > 0.05


def test_a_lost_mtp_head_would_be_noticed(base: LoadedModel, windows: torch.Tensor) -> None:
    """What happens elsewhere: the head's tensors are missing and it drafts from noise."""
    assert base.mtp is not None
    lost = LoadedModel(base.arch, base.trunk, base.lm_head, base.arch.mtp.build().eval())
    torch.manual_seed(0)
    for parameter in lost.mtp.to_empty(device="cpu").parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    assert measure_acceptance(lost, windows[:4, :48], 32).rates[0] < 0.05


def test_fewer_bits_and_less_care_lose_more(
    quantized: Quantized, wide: Path, trained: Path, rounded: Path, lost: Lost
) -> None:
    """W8 < W4 trained < W4 rounded < W3 < W2, and no gap is within its standard errors."""
    narrow = [quantized(Recipe(scheme=Scheme(bits=bits), algorithm=Rtn())) for bits in (3, 2)]
    found = [lost(folder).kld for folder in (wide, trained, rounded, *narrow)]
    assert 0 < found[0].mean <= 1e-4
    for less, more in pairwise(found):
        assert more.mean - less.mean > 2 * (less.standard_error + more.standard_error)


def test_eight_bits_and_training_keep_the_answers(wide: Path, trained: Path, lost: Lost) -> None:
    assert lost(wide).same_top.mean > 0.99
    assert lost(trained).same_top.mean > 0.85
    assert lost(trained).candidate_perplexity < 1.1 * lost(trained).base_perplexity


def test_gptq_loses_less_than_rounding(compensated: Path, rounded: Path, lost: Lost) -> None:
    assert 0 < lost(compensated).kld.mean <= 0.8 * lost(rounded).kld.mean
    assert lost(compensated).same_top.mean > 0.9


def test_a_quantized_mtp_layer_accepts_nearly_as_many_drafts(
    base: LoadedModel, compensated: Path, windows: torch.Tensor
) -> None:
    prompts = windows[:, :48]
    both = (base, load_model(compensated))
    before, after = (measure_acceptance(m, prompts, 48).rates[0] for m in both)
    assert after > 0.8 * before


def resident(base: LoadedModel, candidate: Path, windows: torch.Tensor) -> torch.Tensor:
    """Divergences [P] of two models that are in memory as a whole, window by window."""
    other = load_model(candidate)
    found = []
    for window in windows[:, None]:
        logits = [model.logits(model.hidden(window))[0, :-1] for model in (base, other)]
        found.append(kl_divergence(*logits))
    return torch.cat(found)


def differences(one: Scores, other: Scores) -> dict[str, float]:
    """The largest difference of each figure."""
    names = ("kld", "base_log_probs", "candidate_log_probs", "base_confidence")
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return {name: float((a - b).abs().max()) for name, (a, b) in pairs.items()}


def test_streamed_is_resident(
    bundled: Path, base: LoadedModel, compensated: Path, windows: torch.Tensor
) -> None:
    expected = resident(base, compensated, windows[:6])
    found = compare(bundled, compensated, windows[:6], HOW)
    assert float(expected.mean()) > 0.001
    assert torch.allclose(found.kld, expected, **ROUNDING)
    assert float((found.kld - expected).mean()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("vocabulary", "positions", "rows"), [(8192, 64, 1), (96, 50, 8), (2048, 7, 4), (352, 762, 3)]
)
def test_sizes_of_passes_and_pieces_change_nothing_but_rounding(
    bundled: Path,
    compensated: Path,
    windows: torch.Tensor,
    vocabulary: int,
    positions: int,
    rows: int,
) -> None:
    whole = compare(bundled, compensated, windows[:6], HOW)
    with pieces_of(vocabulary, positions):
        how = Arithmetic(HOW.device, rows_per_pass=rows)
        one, again = (compare(bundled, compensated, windows[:6], how) for _ in range(2))
    assert differences(one, again) == dict.fromkeys(differences(one, again), 0.0)
    assert torch.equal(one.candidate_top, again.candidate_top)
    assert torch.allclose(one.kld, whole.kld, **ROUNDING)
    assert float((one.kld - whole.kld).mean()) == pytest.approx(0, abs=1e-7)
    assert max(differences(one, whole).values()) < 1e-4
