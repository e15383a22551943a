"""A repaired MTP head drafts as well in the real vLLM as the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_checkpoints import Corpus
from support.doctor_truth import job, run_program
from support.good_checkpoints import FORMATS

from nybble.doctor.repair.run import repair

pytestmark = pytest.mark.engine

ENGINE_PYTHON = Path(__file__).parents[2] / ".engine-venv" / "bin" / "python"
GRAFTED = tuple(f"mtp-dropped-{form}-w4" for form in FORMATS)
# Whatever else is repaired equals what was never broken, bit for bit (tests/e2e/test_repair.py).
DEQUANTIZED = tuple(
    f"{kind}-{form}-w4" for kind in ("mtp-fc-packed", "mtp-layer-packed") for form in FORMATS
)
DECLARED_ANEW = tuple(f"mtp-rule-missing-{form}-w4" for form in FORMATS)


@pytest.fixture(scope="module")
def results(
    tiny: Path, heldout_prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """vLLM's counters, of the base, a sound checkpoint and every repaired one."""
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    folder = tmp_path_factory.mktemp("repaired")
    corpus = Corpus(tiny, folder / "corpus")
    prompts = heldout_prompts.tolist()
    jobs = {
        "base": job(tiny, prompts, mtp=True),
        "sound": job(corpus.good("auto_round-w4"), prompts, mtp=True),
    }
    for name in (*GRAFTED, *DEQUANTIZED, *DECLARED_ANEW):
        base = str(tiny) if name in GRAFTED else None
        report = repair(corpus.broken(name), folder / name, base)
        assert report.is_clean, (name, report)
        jobs[name] = job(folder / name, prompts, mtp=True)
    found = run_program(ENGINE_PYTHON, "vllm_batch_runner.py", jobs, folder)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", [*GRAFTED, *DEQUANTIZED, *DECLARED_ANEW])
def test_acceptance_is_back(name: str, results: dict[str, Any]) -> None:
    base, sound, repaired = (
        results[each]["accepted"] / results[each]["draft_tokens"]
        for each in ("base", "sound", name)
    )
    assert results["base"]["draft_tokens"] > 400
    assert base > 0.5
    # A rounded trunk writes other text than the base, so some of it may be easier to draft.
    assert repaired > base - 0.03
    assert abs(repaired - sound) < 0.03
