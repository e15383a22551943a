"""GPTQ through the pipeline: its settings, what it logs, and what padding must not do."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import Tiny, quantized_modules, random_text, read_json, read_weights
from support.packed import codes_and_scales, dense

from nybble.data import rows as rows_module
from nybble.data.rows import build_rows
from nybble.pipeline.quantize import load_tokenizer, quantize
from nybble.recipe.schema import Algorithm, Calibration, Gptq, Recipe, Rtn, Scheme, SignRound

MODULES = quantized_modules(Tiny().prefix)
FIRST_INPUT = {f"{Tiny().prefix}layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z")}
FILE = "model.safetensors"
VARIANTS = {
    "plain": Gptq(),
    "in order": Gptq(act_order=False),
    "sequential": Gptq(true_sequential=True),
    "both": Gptq(act_order=False, true_sequential=True),
    "more damped": Gptq(damp=0.1),
    "min-max": Gptq(scale_init="minmax"),
}
Quantized = Callable[[Algorithm], Path]


@pytest.fixture(scope="module")
def quantized(
    tiny_base: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Quantized:
    """The tiny checkpoint by some algorithm; each is made once and not to be changed."""
    made: dict[Algorithm, Path] = {}

    def by(algorithm: Algorithm) -> Path:
        if algorithm not in made:
            recipe = Recipe(algorithm=algorithm, calibration=calibration)
            out = tmp_path_factory.mktemp("gptq") / "out"
            made[algorithm] = quantize(tiny_base, out, recipe, "cpu").out
        return made[algorithm]

    return by


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Short documents, of which no two have the same length."""
    path = tmp_path_factory.mktemp("text") / "short.jsonl"
    lines = [random_text(2 + n, seed=n).strip().replace("\n", " ") for n in range(12)]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    return Calibration(source=str(path), rows=6, seqlen=40, layout="pad", min_tokens=8)


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "quant_log.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_weights(one: Path, other: Path) -> bool:
    return (one / FILE).read_bytes() == (other / FILE).read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_less_is_lost_than_by_rounding_to_the_same_scales(quantized: Quantized, name: str) -> None:
    rows = log_of(quantized(VARIANTS[name]))
    assert {row["module"] for row in rows} == MODULES
    shares = []
    for row in rows:
        assert 0 < float(row["output_error"]) < float(row["rtn_output_error"]) < 0.2, row
        shares.append(float(row["output_error"]) / float(row["rtn_output_error"]))
    assert sum(shares) / len(shares) < 0.7


def test_the_log_tells_what_gptq_did(quantized: Quantized) -> None:
    for row in log_of(quantized(Gptq())):
        assert row["algorithm"] == "gptq"
        assert row["tokens"] == "256"
        assert row["dead_channels"] == row["too_few_tokens"] == "0"
        assert float(row["damping"]) == pytest.approx(0.01 * 2 ** int(row["damping_increases"]))
        assert 0 < float(row["seconds"]) <= float(row["block_seconds"])
        assert row["block_loss"] == row["block_loss_start"] == row["best_iter"] == ""
    dampings = {float(row["damping"]) for row in log_of(quantized(Gptq(damp=0.1)))}
    assert dampings == {0.1}


@pytest.mark.parametrize("name", ["plain", "both"])
def test_two_runs_give_the_same_bytes(
    quantized: Quantized, tiny_base: Path, calibration: Calibration, tmp_path: Path, name: str
) -> None:
    torch.manual_seed(5)
    recipe = Recipe(algorithm=VARIANTS[name], calibration=calibration)
    again = quantize(tiny_base, tmp_path / "out", recipe, "cpu").out
    assert same_weights(again, quantized(VARIANTS[name]))


def test_settings_matter_from_where_they_can(quantized: Quantized) -> None:
    """The first input of all is the base's own, whether or not later ones are gathered anew."""
    plain, sequential = (
        read_weights(quantized(VARIANTS[name])) for name in ("plain", "sequential")
    )
    for module in MODULES:
        same = torch.equal(plain[f"{module}.qweight"], sequential[f"{module}.qweight"])
        assert same == (module in FIRST_INPUT), module
    in_order = read_weights(quantized(VARIANTS["in order"]))
    for module in FIRST_INPUT:
        assert torch.equal(plain[f"{module}.scales"], in_order[f"{module}.scales"])
        assert not torch.equal(plain[f"{module}.qweight"], in_order[f"{module}.qweight"])


def test_scales_stay_those_of_the_original_columns(quantized: Quantized, tiny_base: Path) -> None:
    """Nothing permuted is stored: the codes fit the base's columns as they stand."""
    source, stored = read_weights(tiny_base), read_weights(quantized(Gptq()))
    for module in MODULES:
        weight = source[f"{module}.weight"].float()
        error = (dense(stored, module) - weight).square().sum() / weight.square().sum()
        assert float(error) < 0.05, module
        assert not any(name == f"{module}.g_idx" for name in stored)


@pytest.mark.parametrize("start", ["minmax", "mse", "importance"])
def test_signround_without_steps_rounds_to_nearest(quantized: Quantized, start: str) -> None:
    still = quantized(SignRound(iters=0, scale_init=start))
    nearest = quantized(Rtn(scale_init=start))
    assert same_weights(still, nearest)
    manifest = read_json(still / "nybble.json")
    assert manifest["recipe"]["algorithm"]["iters"] == 0
    assert (manifest["calibration"] is None) == (start != "importance")
    assert {row["best_iter"] for row in log_of(still)} == {""}


def test_importance_chooses_other_scales_than_extremes(quantized: Quantized) -> None:
    weighted, spanned = (quantized(Rtn(scale_init=s)) for s in ("importance", "minmax"))
    assert not same_weights(weighted, spanned)
    one, other = (
        codes_and_scales(read_weights(f), sorted(MODULES)[0]) for f in (weighted, spanned)
    )
    assert (abs(one[1]) < abs(other[1])).any()


@pytest.mark.parametrize(
    "algorithm",
    [
        Gptq(),
        Gptq(true_sequential=True),
        SignRound(iters=4, batch_size=2),
        Rtn(scale_init="importance"),
    ],
    ids=str,
)
def test_what_stands_behind_short_rows_changes_no_byte(
    tiny_base: Path,
    padded: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Algorithm,
) -> None:
    recipe = Recipe(
        scheme=Scheme(mtp_bits=8, lm_head_bits=8), algorithm=algorithm, calibration=padded
    )
    real = build_rows(padded, load_tokenizer(tiny_base))
    assert len(set(real.lengths.tolist())) > 3
    assert int(real.lengths.min()) < 20
    outs, ids = [], []
    for pad in (0, 251):
        monkeypatch.setattr(rows_module, "PAD_ID", pad)
        ids.append(build_rows(padded, load_tokenizer(tiny_base)).token_ids)
        outs.append(quantize(tiny_base, tmp_path / f"pad {pad}", recipe, "cpu").out)
    assert torch.equal(ids[0] != ids[1], ~real.mask())
    assert same_weights(*outs)
    logs = [log_of(out) for out in outs]
    for one, other in zip(*logs, strict=True):
        for column in ("tokens", "output_error", "block_loss", "block_loss_start", "best_iter"):
            assert one[column] == other[column], (one["module"], column)
        fewer = len(real.lengths) if one["module"].startswith("mtp.") else 0
        assert int(one["tokens"]) == int(real.lengths.sum()) - fewer
