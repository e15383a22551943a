"""What the doctor foretells of a checkpoint is what the real engines do with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.broken_checkpoints import CASES, Corpus
from support.doctor_truth import (
    NAMES,
    OLD,
    WITHOUT_MTP,
    folder_of,
    is_gptq,
    run_old_vllm,
    run_transformers,
    run_vllm,
    seen_in_old_vllm,
    seen_in_transformers,
    seen_in_vllm,
)
from support.good_checkpoints import GOOD

from nybble.doctor.check import check_checkpoint
from nybble.doctor.engines import chosen_engines
from nybble.doctor.findings import Harm, Part
from nybble.doctor.verdict import Verdict

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
ENGINE_PYTHON = ROOT / ".engine-venv" / "bin" / "python"
LOADER_PYTHON = ROOT / ".loader-venv" / "bin" / "python"
OLD_VERSIONS = ("0.24.0", "0.28.0", "0.30.0")
PROMPTS, ROWS, CONTEXT = 16, 2, 32

Judge = Callable[[str, str, str], Verdict]


@pytest.fixture(scope="module")
def corpus(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tiny, tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def foretold(corpus: Corpus) -> Judge:
    """(checkpoint, engine, version) -> the doctor's verdict, by all that it can read."""

    def judge(name: str, engine: str, version: str) -> Verdict:
        folder = str(folder_of(corpus, name))
        (verdict,) = check_checkpoint(
            folder, engines=chosen_engines(engine, version), deep=True
        ).verdicts
        return verdict

    return judge


@pytest.fixture(scope="module")
def in_vllm(
    corpus: Corpus, heldout_prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    prompts = heldout_prompts[:PROMPTS].tolist()
    return run_vllm(corpus, ENGINE_PYTHON, prompts, tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def in_old_vllm(
    corpus: Corpus, heldout_prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """Release -> results; each is run once."""

    @cache
    def run(version: str) -> dict[str, Any]:
        python = ROOT / ".old-engine-venv" / version / "bin" / "python"
        if not python.exists():
            pytest.skip(f"no vLLM {version}: tools/old_engine_env/build.sh {version} builds it")
        prompts = heldout_prompts[:PROMPTS].tolist()
        return run_old_vllm(corpus, python, prompts, tmp_path_factory.mktemp("old"))

    return run


@pytest.fixture(scope="module")
def in_transformers(
    corpus: Corpus, heldout_prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool], dict[str, Any]]:
    """Whether by optimum -> results; each is run once."""

    @cache
    def run(gptq: bool) -> dict[str, Any]:
        python = LOADER_PYTHON if gptq else Path(sys.executable)
        if not python.exists():
            pytest.skip("no environment with optimum: make loader-env builds it")
        names = [name for name in NAMES if is_gptq(name) == gptq]
        ids = heldout_prompts[:ROWS, :CONTEXT].tolist()
        return run_transformers(corpus, python, names, ids, tmp_path_factory.mktemp("loaded"))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_vllm_does_as_foretold(name: str, in_vllm: dict[str, Any], foretold: Judge) -> None:
    observed = seen_in_vllm(name, in_vllm)
    assert observed.contradicts(foretold(name, "vllm", "0.32")) is None
    if name in GOOD:
        assert observed.trunk and observed.mtp, observed


@pytest.mark.parametrize("name", WITHOUT_MTP)
def test_what_only_hits_the_head_leaves_the_trunk_alone(
    name: str, in_vllm: dict[str, Any], foretold: Judge
) -> None:
    verdict = foretold(name, "vllm", "0.32")
    assert verdict.loads
    assert verdict.outcomes[Part.MTP].harm is Harm.REFUSED
    assert seen_in_vllm(f"{name}:0", in_vllm).trunk


@pytest.mark.parametrize("name", NAMES)
def test_transformers_does_as_foretold(
    name: str, in_transformers: Callable[[bool], dict[str, Any]], foretold: Judge
) -> None:
    results = in_transformers(is_gptq(name))
    observed = seen_in_transformers(name, results)
    assert observed.contradicts(foretold(name, "transformers", "5.23")) is None
    if name in GOOD:
        assert observed.trunk, observed


@pytest.mark.parametrize("version", OLD_VERSIONS)
@pytest.mark.parametrize("name", OLD)
def test_an_old_vllm_does_as_foretold(
    name: str,
    version: str,
    in_old_vllm: Callable[[str], dict[str, Any]],
    in_vllm: dict[str, Any],
    foretold: Judge,
) -> None:
    results = in_old_vllm(version)
    assert results[OLD[0]]["vllm_version"] == version
    observed = seen_in_old_vllm(name, results, in_vllm["auto_round-w4"]["outputs"])
    assert observed.contradicts(foretold(name, "vllm", version)) is None
    if version == "0.24.0" and name in CASES:
        assert observed.raises is None and observed.mtp is False, "it is silent"
