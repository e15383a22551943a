"""What we measure, against independent instruments: vLLM's own log-probabilities and counters, and
plain forward passes of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.engine.load import load_model
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.acceptance import measure_acceptance
from nybble.eval.compare import compare, output_on
from nybble.eval.kld import kl_divergence, score
from nybble.eval.statistics import statistics
from nybble.recipe.schema import Calibration

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
ENGINE_PYTHON = HERE.parents[1] / ".engine-venv" / "bin" / "python"
WINDOWS, SEQLEN = 12, 64
CPU = torch.device("cpu")
EXACT, ROUNDED = Arithmetic(CPU), Arithmetic(CPU, torch.bfloat16)

RunVllm = Callable[[Path, int], dict[str, Any]]
LogitsOf = Callable[[Path], torch.Tensor]
"""checkpoint -> log-probabilities or logits, [windows, positions, V], of another instrument."""


@pytest.fixture(scope="module")
def windows(tiny: Path) -> torch.Tensor:
    text = Calibration(source="stdlib-heldout", rows=WINDOWS, seqlen=SEQLEN, layout="pack", seed=3)
    return build_rows(text, AutoTokenizer.from_pretrained(tiny)).token_ids


@pytest.fixture(scope="module")
def noise(tiny: Path, windows: torch.Tensor) -> float:
    """How far the base in bfloat16 is from itself: no instrument sees less."""
    with ModelWeights(tiny) as base:
        exact, rounded = (output_on(base, windows, how) for how in (EXACT, ROUNDED))
        floor = score(exact, rounded, windows[:, 1:].flatten(), len(windows), CPU).kld.mean()
    assert 1e-5 < float(floor) < 1e-3
    return float(floor)


@pytest.fixture(scope="module")
def of_vllm(windows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> LogitsOf:
    """The real vLLM's prompt_logprobs, of the whole vocabulary."""
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    folder = tmp_path_factory.mktemp("instruments")

    def run(checkpoint: Path) -> torch.Tensor:
        job = {
            "model": str(checkpoint),
            "prompts_token_ids": windows.tolist(),
            "max_tokens": 1,
            "mtp": 0,
            "max_model_len": 256,
            "ignore_eos": True,
            "logprobs": -1,
        }
        job_file, result_file = folder / "job.json", folder / "result.json"
        job_file.write_text(json.dumps(job))
        command = [str(ENGINE_PYTHON), str(HERE / "vllm_runner.py"), str(job_file)]
        done = subprocess.run(
            [*command, str(result_file)], capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, result_file.read_text()[-2000:] + done.stderr[-2000:]
        rows = json.loads(result_file.read_text())["prompt_logprobs"]
        found = torch.full((WINDOWS, SEQLEN - 1, 2048), torch.nan)
        for row, positions in zip(found, rows, strict=True):
            assert positions[0] == {}  # nothing predicts the first token
            for position, entries in zip(row, positions[1:], strict=True):
                position[list(map(int, entries))] = torch.tensor(list(entries.values()))
        assert not bool(found.isnan().any())
        return found

    return cache(run)


@pytest.fixture(scope="module")
def of_transformers(windows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> LogitsOf:
    """A forward pass of AutoModelForCausalLM; AutoRound loads what it has packed."""
    folder = tmp_path_factory.mktemp("instruments")
    ids_file, logits_file = folder / "ids.json", folder / "logits.safetensors"
    ids_file.write_text(json.dumps(windows.tolist()))

    def run(checkpoint: Path) -> torch.Tensor:
        command = [sys.executable, HERE / "transformers_loader.py", checkpoint]
        command += ["AutoModelForCausalLM", ids_file, logits_file]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout.splitlines()[-1])["missing_keys"] == []
        return load_file(logits_file)["logits"][:, :-1]

    return cache(run)


@pytest.mark.parametrize("instrument", ["of_vllm", "of_transformers"])
def test_divergences_are_those_of_another_instrument(
    tiny: Path,
    tiny_int4: Path,
    windows: torch.Tensor,
    noise: float,
    instrument: str,
    request: pytest.FixtureRequest,
) -> None:
    logits_of: LogitsOf = request.getfixturevalue(instrument)
    base, int4 = logits_of(tiny), logits_of(tiny_int4)
    theirs = kl_divergence(base, int4).mean()
    exact, rounded = (statistics(compare(tiny, tiny_int4, windows, h)) for h in (EXACT, ROUNDED))
    assert exact.kld.mean > 50 * noise
    # They round to bfloat16 as well, but in another order; against exact arithmetic, the rounding
    # of the base and that of the checkpoint each count.
    assert abs(float(theirs) - rounded.kld.mean) < noise
    assert abs(float(theirs) - exact.kld.mean) < 3 * noise < exact.kld.standard_error
    for logits, perplexity in ((base, exact.base_perplexity), (int4, exact.candidate_perplexity)):
        of_text = logits.double().log_softmax(dim=-1).gather(2, windows[:, 1:, None])
        assert float(of_text.mean().neg().exp()) == pytest.approx(perplexity, rel=2e-3)


@pytest.mark.parametrize("instrument", ["of_vllm", "of_transformers"])
def test_our_base_is_theirs_up_to_the_noise(
    tiny: Path,
    windows: torch.Tensor,
    noise: float,
    instrument: str,
    request: pytest.FixtureRequest,
) -> None:
    theirs = request.getfixturevalue(instrument)(tiny)
    model = load_model(tiny)
    ours = model.logits(model.hidden(windows))[:, :-1]
    assert 0 < float(kl_divergence(ours, theirs).mean()) < 2 * noise


@pytest.mark.parametrize(
    ("checkpoint", "num_drafts"),
    [("tiny_int4", 1), ("tiny_int4", 2), ("tiny_int4", 3), ("tiny", 3)],
)
def test_acceptance_is_what_vllm_counts(
    heldout_prompts: torch.Tensor,
    run_vllm: RunVllm,
    checkpoint: str,
    num_drafts: int,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(checkpoint)
    theirs = run_vllm(folder, num_drafts)
    num_new = len(theirs["outputs"][0])
    ours = measure_acceptance(load_model(folder), heldout_prompts, num_new, num_drafts)
    counted = [count / theirs["drafts"] for count in theirs["accepted_per_pos"]]
    assert len(counted) == num_drafts
    assert theirs["drafts"] > 300
    assert ours.rates == pytest.approx(counted, abs=0.03)
