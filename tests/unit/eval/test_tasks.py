"""``nybble eval`` up to the program that runs lm-eval, which a stand-in takes the place of."""

from __future__ import annotations

import json
import math
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import Outcome, refusal

from nybble.core.errors import CheckpointError, EvaluationError, RecipeError
from nybble.eval.task_runner import Refused, load_tasks, one_line, plain
from nybble.eval.tasks import LM_EVAL, Request, evaluate, scores_of

Nybble = Callable[..., Outcome]

FOUND: dict[str, Any] = {
    "results": {
        "sums": {
            "name": "sums",
            "alias": "sums",
            "sample_len": 40,
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": 0.07,
            "exact_match,flexible": 0.5,
            "exact_match_stderr,flexible": "N/A",
        },
        "text": {"alias": "text", "sample_len": 3, "bits_per_byte,none": math.nan},
        "both": {"alias": "both"},
    },
    "versions": {"sums": 3.0, "text": None, "both": None},
    "n-shot": {"sums": 5, "text": 0},
    "higher_is_better": {"sums": {"exact_match": True}, "text": {"bits_per_byte": False}},
    "seeds": {"random_seed": 0, "fewshot_seed": 1234},
    "packages": {"lm_eval": "0.4.13", "transformers": "5.23.0"},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    """A python that runs nothing: it answers every job with this result, or with none."""

    def make(result: dict[str, Any] | None, exit_code: int = 0) -> Path:
        python, answer = tmp_path / "python", tmp_path / "answer.json"
        answer.write_text(json.dumps(result))
        copy = f"shutil.copy({str(answer)!r}, sys.argv[3])\n" if result is not None else ""
        python.write_text(
            f"#!{sys.executable}\n"
            "import shutil, sys, pathlib\n"
            f"shutil.copytree(pathlib.Path(sys.argv[1]).parent, {str(tmp_path / 'seen')!r})\n"
            f"{copy}sys.exit({exit_code})\n"
        )
        python.chmod(0o755)
        return python

    return make


def test_every_figure_is_a_score() -> None:
    strict, flexible, text = scores_of(FOUND)
    assert (strict.task, strict.metric, strict.filter) == ("sums", "exact_match", "strict")
    assert (strict.value, strict.standard_error, strict.documents) == (0.25, 0.07, 40)
    assert (strict.task_version, strict.fewshot, strict.higher_is_better) == ("3.0", 5, True)
    assert (flexible.value, flexible.standard_error) == (0.5, None)
    assert (text.value, text.task_version, text.higher_is_better) == (None, None, False)


def test_the_runner_gets_the_whole_job_and_a_folder_of_its_own(
    checkpoint: Path, tmp_path: Path, stand_in: Callable[..., Path]
) -> None:
    request = Request(
        checkpoint, ("sums", "text"), "vllm", limit=7, num_fewshot=2, python=stand_in(FOUND)
    )
    report = evaluate(request, "nybble eval")
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == [
        "job.json",
        "task_runner.py",
    ]
    job = json.loads((tmp_path / "seen" / "job.json").read_text())
    assert job["checkpoint"] == str(checkpoint)
    assert (job["tasks"], job["engine"]) == (["sums", "text"], "vllm")
    assert (job["limit"], job["num_fewshot"], job["batch_size"]) == (7, 2, "auto")
    assert (report.limit, report.device, report.batch_size) == (7, None, "auto")
    assert report.schema == "nybble.eval/1"
    assert report.versions["lm_eval"] == "0.4.13"
    assert report.seeds == FOUND["seeds"]
    assert len(report.scores) == 3


@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        ({"missing": ["lm_eval"]}, RecipeError, f"pip install {LM_EVAL}"),
        ({"missing": ["lm_eval", "vllm"]}, RecipeError, "give the python of vLLM's environment"),
        ({"refused": "no such task"}, RecipeError, "^no such task$"),
        ({"error": "OSError: full"}, EvaluationError, "model failed: OSError: full"),
        (None, EvaluationError, "ended with exit code 3 and without a result"),
    ],
)
def test_what_went_wrong_is_told(
    checkpoint: Path,
    stand_in: Callable[..., Path],
    result: dict[str, Any] | None,
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        evaluate(Request(checkpoint, ("sums",), "vllm", python=stand_in(result, 3)), "")


def test_a_request_that_cannot_be_carried_out_is_refused(checkpoint: Path) -> None:
    cases = {
        "engine 'tgi' is unknown": Request(checkpoint, ("sums",), "tgi"),
        "no task is named": Request(checkpoint, ()),
        "there is no folder": Request(checkpoint, ("sums",), include_path=checkpoint / "x"),
        "vLLM chooses the device": Request(checkpoint, ("sums",), "vllm", device="cpu"),
        "--vllm-python is for": Request(checkpoint, ("sums",), python=Path(sys.executable)),
        "cannot run": Request(checkpoint, ("sums",), "vllm", python=checkpoint / "python"),
        "device 'tpu' is not": Request(checkpoint, ("sums",), device="tpu"),
    }
    for message, request in cases.items():
        with pytest.raises(RecipeError, match=message):
            evaluate(request, "")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        evaluate(Request(checkpoint.parent, ("sums",)), "")


def test_the_command_prints_and_writes(
    nybble: Nybble, checkpoint: Path, tmp_path: Path, stand_in: Callable[..., Path]
) -> None:
    out = tmp_path / "scores.json"
    found = {**FOUND, "packages": {"lm_eval": "0.4.13", "vllm": "0.32.0"}}
    options = ["--engine", "vllm", "--vllm-python", stand_in(found), "--json", out]
    outcome = nybble("eval", checkpoint, "--tasks", "sums, text,sums,", *options)
    assert outcome.code == 0, outcome.err
    assert "in vllm 0.32.0, by lm-eval 0.4.13" in outcome.out
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [
        "sums",
        "3.0",
        "exact_match,",
        "strict",
        "higher",
        *["0.2500", "0.0700", "40", "5"],
    ] in lines
    assert ["text", "bits_per_byte", "lower", "not", "finite", "3", "0"] in lines
    job = json.loads((tmp_path / "seen" / "job.json").read_text())
    assert job["tasks"] == ["sums", "text"]
    written = json.loads(out.read_text())
    assert written["scores"][0]["value"] == 0.25
    assert written["scores"][2]["value"] is None
    assert written["command"].startswith("nybble eval ")


def test_the_command_refuses_in_one_line(nybble: Nybble, checkpoint: Path) -> None:
    message = refusal(nybble("eval", checkpoint, "--tasks", "sums", "--engine", "tgi"))
    assert message == "engine 'tgi' is unknown: give transformers or vllm"


def test_lm_eval_is_the_release_that_the_extra_installs() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert LM_EVAL in project["project"]["optional-dependencies"]["eval"]


class Manager:
    """lm-eval's TaskManager, of tasks made by hand."""

    def __init__(self, tasks: dict[str, Any], groups: dict[str, list[str]]) -> None:
        self.tasks, self.groups = tasks, groups

    def load(self, names: list[str]) -> dict[str, Any]:
        (name,) = names
        members = self.groups.get(name, [name])
        groups = {name: f"group {name}"} if name in self.groups else {}
        return {"tasks": {member: self.tasks[member] for member in members}, "groups": groups}


class Task(SimpleNamespace):
    """A task of lm-eval's, as far as it is looked at."""

    def set_config(self, key: str, value: dict[str, Any], update: bool) -> None:
        assert update
        getattr(self.config, key).update(value)


def task(metrics: dict[str, Any], judge: Any = None, **generation: Any) -> Task:
    config = SimpleNamespace(process_results=judge, generation_kwargs=generation or None)
    return Task(config=config, task_name="sums", _metric_fn_list=metrics)


def test_groups_stay_whole_and_greedy_is_said_where_nothing_is() -> None:
    silent, sampled = task({"acc": len}, until=["\n"]), task({"acc": len}, temperature=0.7)
    multiple_choice, own_judge = task({"acc": len}), task({"acc": None}, judge=len)
    tasks = {"a": silent, "b": sampled, "c": multiple_choice, "d": own_judge}
    built = load_tasks(Manager(tasks, {"both": ["a", "b"]}), ["both", "c", "d"])
    assert built == ["group both", multiple_choice, own_judge]
    assert silent.config.generation_kwargs == {"until": ["\n"], "do_sample": False}
    assert sampled.config.generation_kwargs == {"temperature": 0.7}


def test_a_metric_that_could_not_be_had_is_refused() -> None:
    with pytest.raises(Refused, match="'sums': its metric 'f1' is a program on the hub"):
        load_tasks(Manager({"a": task({"acc": len, "f1": None})}, {}), ["a"])


def test_results_become_plain_and_errors_one_line() -> None:
    import torch

    assert json.dumps({"x": torch.tensor(0.5)}, default=plain) == '{"x": 0.5}'
    assert json.dumps({"x": Path("a")}, default=plain) == '{"x": "a"}'
    assert one_line(ValueError("two\n  lines")) == "ValueError: two lines"
