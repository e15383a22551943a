"""Scores on lm-eval's tasks, computed by Transformers or vLLM in a process of their own."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nybble.checkpoint.ondisk import read_object
from nybble.core.errors import EvaluationError, RecipeError
from nybble.engine.device import resolve_device

LM_EVAL = "lm-eval==0.4.13"
BATCH_SIZES: dict[str, int | str] = {"transformers": 8, "vllm": "auto"}
"""Engines, and how many requests each is given at a time unless the user says; vLLM queues."""
_RUNNER = "task_runner.py"
_STANDARD_ERROR = 2


@dataclass(frozen=True)
class Request:
    """What to evaluate, on what, and how."""

    checkpoint: Path
    tasks: tuple[str, ...]
    engine: str = "transformers"
    include_path: Path | None = None
    """A folder of further tasks. The Python in it is run, as lm-eval does."""
    limit: int | None = None
    """Documents per task, from the first; None: all."""
    num_fewshot: int | None = None
    """None: as many examples as each task says."""
    batch_size: int | None = None
    device: str = "auto"
    max_length: int | None = None
    """Tokens of a request and its answer; None: what the model has room for."""
    python: Path | None = None
    """Of vLLM's environment; None: this one."""


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks."""

    task: str
    task_version: str | None
    metric: str
    filter: str
    """What was made of the answers before they were judged."""
    value: float | None
    """None: not a finite number."""
    standard_error: float | None
    higher_is_better: bool | None
    documents: int | None
    fewshot: int | None


@dataclass(frozen=True)
class EvalReport:
    """Everything ``nybble eval`` measured, and under which conditions."""

    checkpoint: str
    engine: str
    device: str | None
    batch_size: int | str
    limit: int | None
    max_length: int | None
    scores: tuple[Score, ...]
    seeds: dict[str, int]
    seconds: float
    versions: dict[str, str]
    command: str
    schema: str = "nybble.eval/1"


def evaluate(request: Request, command: str) -> EvalReport:
    """Runs the tasks; ``command`` is kept in the report. Progress goes to standard error.

    Raises RecipeError for a request that cannot be carried out, CheckpointError for a folder that
    is no checkpoint, EvaluationError if lm-eval or the engine fails.
    """
    request = _checked(request)
    batch_size = request.batch_size or BATCH_SIZES[request.engine]
    began = time.monotonic()
    job = {**asdict(request), "checkpoint": request.checkpoint.resolve(), "batch_size": batch_size}
    found = run_job(request, job)
    return EvalReport(
        checkpoint=str(request.checkpoint),
        engine=request.engine,
        device=None if request.engine == "vllm" else request.device,
        batch_size=batch_size,
        limit=request.limit,
        max_length=request.max_length,
        scores=tuple(scores_of(found)),
        seeds=found["seeds"],
        seconds=time.monotonic() - began,
        versions={"nybble": version("nybble"), **found["packages"]},
        command=command,
    )


def _checked(request: Request) -> Request:
    """The request with its device resolved; raises RecipeError or CheckpointError."""
    if request.engine not in BATCH_SIZES:
        raise RecipeError(f"engine {request.engine!r} is unknown: give {' or '.join(BATCH_SIZES)}")
    if not request.tasks:
        raise RecipeError("no task is named: give some by --tasks, like hellaswag,gsm8k")
    if request.include_path is not None and not request.include_path.is_dir():
        raise RecipeError(f"there is no folder {request.include_path} of tasks")
    read_object(request.checkpoint / "config.json")
    if request.engine == "vllm":
        if request.device != "auto":
            raise RecipeError("vLLM chooses the device itself: leave --device out")
        return request
    if request.python is not None:
        raise RecipeError("--vllm-python is for --engine vllm")
    device = resolve_device(request.device)
    return replace(request, device="cuda:0" if str(device) == "cuda" else str(device))


def run_job(request: Request, job: Mapping[str, Any]) -> dict[str, Any]:
    """What the runner found. Raises RecipeError or EvaluationError with its reason."""
    python = request.python or Path(sys.executable)
    with tempfile.TemporaryDirectory(prefix="nybble-eval-") as name:
        # Away from this package: its folder would stand first where the runner's imports look,
        # and some modules here are called as ones of Python's own are.
        runner, job_file, result_file = (
            Path(name) / file for file in (_RUNNER, "job.json", "result.json")
        )
        with resources.as_file(resources.files("nybble.eval") / _RUNNER) as source:
            shutil.copyfile(source, runner)
        job_file.write_text(json.dumps(job, default=str))
        try:
            done = subprocess.run(
                [str(python), str(runner), str(job_file), str(result_file)],
                stdout=_STANDARD_ERROR,
                check=False,
            )
        except OSError as error:
            raise RecipeError(f"cannot run {python}: {error.strerror}") from error
        if not result_file.exists():
            raise EvaluationError(
                f"the evaluation of {request.checkpoint} ended with exit code {done.returncode} "
                "and without a result"
            )
        return _without_failure(json.loads(result_file.read_text()), request, python)


def _without_failure(found: dict[str, Any], request: Request, python: Path) -> dict[str, Any]:
    if "missing" in found:
        raise RecipeError(_how_to_install(found["missing"], request, python))
    if "refused" in found:
        raise RecipeError(found["refused"])
    if "error" in found:
        raise EvaluationError(f"evaluating {request.checkpoint} failed: {found['error']}")
    return found


def _how_to_install(missing: list[str], request: Request, python: Path) -> str:
    lacks = f"{python} has no {' and no '.join(missing)}"
    if "vllm" in missing:
        return f"{lacks}: give the python of vLLM's environment by --vllm-python"
    if request.python is None:
        return f"{lacks}: pip install 'nybble[eval]'"
    return f"{lacks}: {python} -m pip install {LM_EVAL}"


def scores_of(found: Mapping[str, Any]) -> Iterator[Score]:
    """Figures in lm-eval's result, which keeps them as ``"metric,filter": value``.

    Where it has no standard error it says so in words.
    """
    for task, figures in found["results"].items():
        better = found["higher_is_better"].get(task) or {}
        for key, value in figures.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            task_version = found["versions"].get(task)
            yield Score(
                task=task,
                task_version=None if task_version is None else str(task_version),
                metric=metric,
                filter=name,
                value=_finite(value),
                standard_error=_finite(figures.get(f"{metric}_stderr,{name}")),
                higher_is_better=better.get(metric),
                documents=figures.get("sample_len"),
                fewshot=found["n-shot"].get(task),
            )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
