"""The bundled model, its INT4 form, and the programs that load them in other people's code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.demo import RECIPE, bundled_model
from nybble.pipeline.convert import convert
from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe
from nybble.recipe.schema import Calibration

ROOT = Path(__file__).parents[2]
ENGINE_PYTHON = ROOT / ".engine-venv" / "bin" / "python"
LOADER_PYTHON = ROOT / ".loader-venv" / "bin" / "python"
NEW_TOKENS = 48


@pytest.fixture(scope="session")
def tiny() -> Iterator[Path]:
    """The bundled trained checkpoint."""
    with bundled_model() as folder:
        yield folder


@pytest.fixture(scope="session")
def tiny_int4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its INT4 form, by a short SignRound run."""
    out = tmp_path_factory.mktemp("int4") / "tiny-int4"
    overrides = ["algorithm.iters=40", "calibration.rows=32"]
    quantize(tiny, out, load_recipe(RECIPE, overrides), "cpu")
    return out


@pytest.fixture(scope="session")
def tiny_gptq_mtp4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its INT4 form by GPTQ, with the MTP layer in INT4 too."""
    out = tmp_path_factory.mktemp("mtp4") / "tiny-mtp4"
    overrides = ["algorithm.name=gptq", "calibration.rows=32", "scheme.mtp_bits=4"]
    quantize(tiny, out, load_recipe(RECIPE, overrides), "cpu")
    return out


@pytest.fixture(scope="session")
def in_format(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """(checkpoint, format) -> the same checkpoint in that format; each pair is made once."""
    made: dict[tuple[Path, str], Path] = {}

    def converted(checkpoint: Path, format_name: str) -> Path:
        if format_name == "auto_round":
            return checkpoint
        key = (checkpoint, format_name)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("formats") / f"{checkpoint.name}-{format_name}"
            convert(checkpoint, made[key], format_name)
        return made[key]

    return converted


@pytest.fixture(scope="session")
def heldout_prompts(tiny: Path) -> torch.Tensor:
    """Starts of held-out rows, int64 [prompts, tokens]."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = Calibration(source="stdlib-heldout", rows=32, seqlen=48, layout="pack", seed=3)
    return build_rows(text, tokenizer).token_ids


@pytest.fixture(scope="session")
def run_vllm(
    heldout_prompts: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, int], dict[str, Any]]:
    """(checkpoint, draft tokens) -> vllm_runner's result; each pair is run once."""
    if not ENGINE_PYTHON.exists():
        pytest.skip("no vLLM environment: make engine-env builds it")
    folder = tmp_path_factory.mktemp("vllm")
    runner = Path(__file__).with_name("vllm_runner.py")
    results: dict[tuple[Path, int], dict[str, Any]] = {}

    def run(checkpoint: Path, mtp: int) -> dict[str, Any]:
        if (checkpoint, mtp) not in results:
            job = {
                "model": str(checkpoint),
                "prompts_token_ids": heldout_prompts.tolist(),
                "max_tokens": NEW_TOKENS,
                "mtp": mtp,
                "max_model_len": 256,
                "ignore_eos": True,
            }
            job_file, result_file = folder / "job.json", folder / "result.json"
            job_file.write_text(json.dumps(job))
            command = [str(ENGINE_PYTHON), str(runner), str(job_file), str(result_file)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, result_file.read_text() + done.stderr[-2000:]
            results[checkpoint, mtp] = json.loads(result_file.read_text())
        return results[checkpoint, mtp]

    return run


@pytest.fixture(scope="session")
def loader_ids(heldout_prompts: torch.Tensor) -> torch.Tensor:
    """The tokens that every loader's model is run on, int64 [prompts, tokens]."""
    return heldout_prompts[:2]


@pytest.fixture(scope="session")
def run_transformers(
    loader_ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, str, str], tuple[dict[str, Any], Path]]:
    """(checkpoint, auto class, loader) -> what transformers_loader found, and its logits file.

    Loaders: "optimum" has an environment of its own, "auto_round reads gptq" is asked for by an
    option; any other name says only what the checkpoint's own format brings with it.
    """
    folder = tmp_path_factory.mktemp("transformers")
    program = Path(__file__).with_name("transformers_loader.py")
    ids_file = folder / "ids.json"
    ids_file.write_text(json.dumps(loader_ids.tolist()))

    def run(checkpoint: Path, auto_class: str, loader: str) -> tuple[dict[str, Any], Path]:
        python = LOADER_PYTHON if loader == "optimum" else Path(sys.executable)
        if not python.exists():
            pytest.skip("no environment with optimum: make loader-env builds it")
        logits_file = folder / "logits.safetensors"
        command = [str(python), str(program), str(checkpoint), auto_class]
        command += [str(ids_file), str(logits_file)]
        if loader == "auto_round reads gptq":
            command += ["--through", "auto-round"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1]), logits_file

    return run
