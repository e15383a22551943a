"""lm-eval finds of a checkpoint what our own engine does: odds, answers and likelihoods."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Outcome, refusal, run_nybble
from transformers import AutoTokenizer

from nybble.engine.generate import generate_greedy
from nybble.engine.load import LoadedModel, load_model

pytest.importorskip("lm_eval", reason="no lm-eval: pip install 'nybble[eval]'")

InFormat = Callable[[Path, str], Path]
ENGINE_PYTHON = Path(__file__).parents[2] / ".engine-venv" / "bin" / "python"
NEW_TOKENS = 4
NEAR = 0.15
"""Logits nearer than this may change places where bfloat16 rounds otherwise."""
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
    },
    "write": {
        # Nothing about sampling: it is to be greedy.
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "programs": {"output_type": "generate_until", "unsafe_code": True},
    "downloads": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "code_eval", "hf_evaluate": True, "aggregation": "mean"}],
    },
}


@dataclass(frozen=True)
class Texts:
    """Contexts with what really follows, all of held-out text."""

    contexts: tuple[str, ...]
    endings: tuple[str, ...]


class Ours:
    """What lm-eval asks of a model, by the embedded engine in float32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model: LoadedModel = load_model(checkpoint)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)

    def log_odds(self, context: str, ending: str) -> float:
        whole = self.tokenizer(context + ending).input_ids
        return self._scored(whole, len(self.tokenizer(context).input_ids))

    def bits_per_byte(self, texts: tuple[str, ...]) -> float:
        start = [self.tokenizer.eos_token_id]
        total = sum(self._scored(start + self.tokenizer(text).input_ids, 1) for text in texts)
        return -total / math.log(2) / sum(len(text.encode()) for text in texts)

    def answer(self, context: str) -> tuple[str, bool]:
        """What it writes, and whether no other token came near at any place."""
        ids = self.tokenizer(context).input_ids
        whole = generate_greedy(self.model, torch.tensor([ids]), NEW_TOKENS)
        logits = self.model.logits(self.model.hidden(whole))[0, len(ids) - 1 : -1]
        first, second = logits.topk(2).values.unbind(-1)
        text = self.tokenizer.decode(whole[0, len(ids) :])
        assert isinstance(text, str)
        return text, bool((first - second > NEAR).all())

    def _scored(self, ids: list[int], given: int) -> float:
        logits = self.model.logits(self.model.hidden(torch.tensor([ids])))[0]
        chosen = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
        return float(chosen[given - 1 :].sum())


@pytest.fixture(scope="module")
def texts(tiny: Path, heldout_prompts: torch.Tensor) -> Texts:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    rows = [tokenizer.decode(row) for row in heldout_prompts]
    # Between words: there it does not matter whether a text is cut before or after it is tokenized.
    cuts = [re.search(r"(?<=[a-z])(?= [a-z])", row[len(row) // 3 :]) for row in rows]
    pairs = [
        (row[: (at := len(row) // 3 + cut.start())], row[at : at + 24].rstrip())
        for row, cut in zip(rows, cuts, strict=True)
        if cut
    ]
    assert len(pairs) >= 20
    contexts, endings = zip(*pairs, strict=True)
    return Texts(contexts, endings)


@pytest.fixture
def task_folder(texts: Texts, tmp_path: Path) -> Callable[[Ours], Path]:
    """The tasks, with the answers of this model as the right ones."""
    folder = tmp_path / "tasks"
    folder.mkdir()

    def documents(ours: Ours) -> Iterator[dict[str, Any]]:
        wrong = (*texts.endings[1:], texts.endings[0])
        for n, context in enumerate(texts.contexts):
            choices = [texts.endings[n], wrong[n]]
            yield {
                "context": context,
                "choices": choices[:: 1 if n % 2 else -1],
                "label": int(n % 2 == 0),
                "answer": ours.answer(context)[0],
                "text": context,
            }

    def make(ours: Ours) -> Path:
        data = folder / "documents.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents(ours)))
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        for name, task in TASKS.items():
            # JSON is YAML.
            (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **task}))
        return folder

    return make


# One process, no compilation: vllm_runner.py says why of each.
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CACHE_ROOT": str(ENGINE_PYTHON.parents[1] / "vllm-cache"),
    "VLLM_NO_USAGE_STATS": "1",
}


def nybble_eval(folder: Path, checkpoint: Path, tasks: str, *options: str | Path) -> Outcome:
    """Offline, with the data sets' own cache out of the user's."""
    env = {**VLLM_SETTINGS, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf")}
    arguments = ("--tasks", tasks, "--include-path", folder, *options)
    return run_nybble("eval", checkpoint, *arguments, env=env, timeout=400)


def check(outcome: Outcome, report_file: Path, ours: Ours, texts: Texts) -> dict[str, Any]:
    """Every score is the one of our own engine, but for what bfloat16 rounds."""
    assert outcome.code == 0, outcome.err[-3000:]
    report = json.loads(report_file.read_text())
    scores = {score["task"]: score for score in report["scores"]}
    assert list(scores) == ["choose", "write", "read"]
    num = len(texts.contexts)
    wrong = (*texts.endings[1:], texts.endings[0])
    right = [
        ours.log_odds(context, ending) > ours.log_odds(context, other)
        for context, ending, other in zip(texts.contexts, texts.endings, wrong, strict=True)
    ]
    assert abs(scores["choose"]["value"] - sum(right) / num) <= 1.5 / num
    clear = sum(ours.answer(context)[1] for context in texts.contexts)
    assert clear > num / 3
    assert scores["write"]["value"] > (clear - 0.5) / num
    expected = ours.bits_per_byte(texts.contexts)
    assert scores["read"]["value"] == pytest.approx(expected, rel=0.01)
    assert {score["documents"] for score in scores.values()} == {num}
    assert (scores["choose"]["task_version"], scores["choose"]["fewshot"]) == ("2.0", 0)
    assert scores["choose"]["standard_error"] > 0
    return report


@pytest.mark.parametrize("form", ["base", "auto_round", "gptq", "compressed-tensors"])
def test_transformers_scores_are_ours(
    tiny: Path,
    tiny_int4: Path,
    in_format: InFormat,
    texts: Texts,
    task_folder: Callable[[Ours], Path],
    tmp_path: Path,
    form: str,
) -> None:
    checkpoint = tiny if form == "base" else in_format(tiny_int4, form)
    ours, out = Ours(checkpoint), tmp_path / "scores.json"
    options = ("--device", "cpu", "--batch-size", "5", "--json", out)
    outcome = nybble_eval(task_folder(ours), checkpoint, "choose,write,read", *options)
    report = check(outcome, out, ours, texts)
    assert (report["engine"], report["device"], report["batch_size"]) == ("transformers", "cpu", 5)


@pytest.mark.engine
def test_vllm_scores_are_ours(
    tiny: Path, texts: Texts, task_folder: Callable[[Ours], Path], tmp_path: Path
) -> None:
    probe = [str(ENGINE_PYTHON), "-c", "import lm_eval"]
    if not ENGINE_PYTHON.exists() or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no vLLM environment with lm-eval")
    ours, out = Ours(tiny), tmp_path / "scores.json"
    folder = task_folder(ours)
    options = ("--engine", "vllm", "--vllm-python", ENGINE_PYTHON, "--max-length", "256")
    outcome = nybble_eval(folder, tiny, "choose,write,read", *options, "--json", out)
    report = check(outcome, out, ours, texts)
    assert report["versions"]["vllm"]
    assert report["max_length"] == 256


def test_limits_and_examples_are_taken(
    tiny: Path, task_folder: Callable[[Ours], Path], tmp_path: Path
) -> None:
    out = tmp_path / "scores.json"
    options = ("--limit", "3", "--num-fewshot", "2", "--json", out)
    outcome = nybble_eval(task_folder(Ours(tiny)), tiny, "choose", *options)
    assert outcome.code == 0, outcome.err[-3000:]
    (score,) = json.loads(out.read_text())["scores"]
    assert (score["documents"], score["fewshot"]) == (3, 2)
    assert "the first 3 documents" in outcome.out


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("programs", "task 'programs' runs programs that the model writes: nybble does not"),
        ("downloads", "task 'downloads': its metric 'code_eval' is a program on the hub"),
    ],
)
def test_code_from_elsewhere_is_not_run(
    tiny: Path, task_folder: Callable[[Ours], Path], task: str, message: str
) -> None:
    assert message in refusal(nybble_eval(task_folder(Ours(tiny)), tiny, task))


def test_lost_weights_are_not_scored(
    tiny_int4: Path, task_folder: Callable[[Ours], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_int4.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.scales"))
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = nybble_eval(task_folder(Ours(tiny_int4)), broken, "choose")
    assert outcome.code == 2
    assert "finds no weights for 1 parameters" in outcome.err.splitlines()[-1]
