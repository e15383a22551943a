"""What real engines make of sound and broken checkpoints, in terms that a verdict can be held to.

The engines run as programs of their own (tests/engine/*_runner.py, transformers_batch_loader.py);
here are the checkpoints they are given, and what their results mean.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.doctor.findings import Harm, Part
from nybble.doctor.verdict import Outcome, Verdict

from .broken_checkpoints import CASES, Corpus
from .good_checkpoints import GOOD

PROGRAMS = Path(__file__).parents[1] / "engine"
ACCEPTED = 0.7
"""The bundled model's drafts are accepted to 82 %, and 84 % after quantization."""
ALIKE = 0.25
"""Logits this near, root mean square, are those of the same model rounded otherwise."""
EQUAL = 0.75
"""Of greedy texts: the rest may part where two tokens are almost equally likely."""

SOUND = tuple(name for name, good in GOOD.items() if good.runs_on_cpu)
BROKEN = (
    "config-cut-off-auto_round-w4",
    "mtp-shard-missing-gptq-shards",
    "mtp-shard-not-in-the-index-auto_round-shards",
    "stale-shard-gptq-shards",
    "lone-file-beside-the-index-auto_round-shards",
    "shard-cut-off-compressed-tensors-shards",
    "declaration-missing-auto_round-w4",
    "packing-of-another-name-auto_round-w4",
    "desc-act-undeclared-gptq-w4",
    "group-size-misdeclared-compressed-tensors-w4",
    "mtp-rule-missing-auto_round-w4",
    "mtp-rule-missing-gptq-w4",
    "mtp-rule-missing-compressed-tensors-w4",
    "mtp-listed-as-quantized-auto_round-w4",
    "mtp-declared-dense-gptq-mtp4",
    "bare-prefix-ignored-compressed-tensors-w4",
    "quantized-declared-dense-auto_round-w4",
    "head-declared-quantized-gptq-w4",
    "expression-does-not-compile-gptq-w4",
    "entry-without-bits-auto_round-w4",
    "block-list-of-the-text-model-auto_round-w4",
    "module-list-is-flat-gptq-w4",
    "group-order-declared-compressed-tensors-w4",
    "status-frozen-compressed-tensors-w4",
    "key-unknown-compressed-tensors-w4",
    "head-tied-at-one-level-gptq-w4",
    "mtp-head-undeclared-auto_round-w4",
    "mtp-dropped-auto_round-w4",
    "mtp-dropped-gptq-w4",
    "mtp-fc-missing-compressed-tensors-w4",
    "mtp-fc-missing-from-the-base-base",
    "mtp-fc-transposed-auto_round-w4",
    "mtp-fc-packed-auto_round-w4",
    "mtp-layer-packed-compressed-tensors-w4",
    "dense-declared-quantized-gptq-w4",
    "fused-dense-declared-quantized-compressed-tensors-w4",
    "fused-group-split-gptq-w4",
    "fused-group-of-two-widths-compressed-tensors-w4",
    "scales-missing-auto_round-w4",
    "zeros-missing-gptq-w4",
    "weight-left-beside-codes-gptq-w4",
    "norm-missing-from-the-base-base",
    "codes-transposed-compressed-tensors-w4",
    "activation-order-gptq-w4",
    "activation-order-undeclared-gptq-w4",
    "zeros-of-version-2-auto_round-w4",
    "cast-to-float16-compressed-tensors-w4",
    "text-only-auto_round-w4",
    "scales-not-finite-auto_round-w4",
)
NAMES = (*SOUND, *BROKEN)
WITHOUT_MTP = tuple(name for name in BROKEN if name.startswith("mtp-rule-missing"))
"""Run once more with MTP off."""
DIES_WITH_MTP = ("text-only-auto_round-w4",)
"""vLLM 0.32 dies or hangs on the CPU, each time elsewhere, once it is to draft for these."""
OLD = (
    "auto_round-w4",
    "gptq-mtp4",
    "compressed-tensors-shards",
    *WITHOUT_MTP,
    "mtp-listed-as-quantized-auto_round-w4",
    "mtp-declared-dense-gptq-mtp4",
    "mtp-dropped-auto_round-w4",
    "mtp-fc-missing-compressed-tensors-w4",
    "mtp-fc-packed-auto_round-w4",
    "mtp-layer-packed-compressed-tensors-w4",
)
"""What old releases are given: where the MTP head is lost without a word."""
_NO_CPU_KERNEL = re.compile("Failed to find a kernel|on CPU|Marlin does not support")


@dataclass(frozen=True)
class Observed:
    """What an engine did with a checkpoint."""

    raises: frozenset[str] | None = None
    """Names of the exception that stops it, and of those it stands for; empty: it stops for want
    of a CPU kernel, before anything else could; None: it loads."""
    runs: bool = True
    """What was loaded computes at all."""
    trunk: bool = False
    """It computes what the sound checkpoint does."""
    mtp: bool | None = None
    """Its drafts are accepted as they should be; None: nobody looked."""
    told: str = ""
    """For people."""

    def contradicts(self, verdict: Verdict) -> str | None:
        """What the verdict foretold otherwise; None: it came true."""
        said = f"{self.told}, foretold: {verdict.sentence}"
        trunk = verdict.outcomes[Part.TRUNK]
        mtp = verdict.outcomes.get(Part.MTP)
        if not self.runs:
            return None if trunk.harm > Harm.ABSENT else said
        met = [trunk] if mtp is None or self.looks_away else [trunk, mtp]
        refused = [each for each in met if each.harm is Harm.REFUSED]
        if self.raises is not None or refused:
            fits = self.raises is not None and any(map(self._is, refused))
            return None if fits else said
        if self.trunk != (trunk.harm <= Harm.ABSENT):
            return said
        # What a broken trunk's drafts are worth says nothing of the head.
        if self.trunk and self.mtp is not None and mtp is not None:
            return None if self.mtp == (mtp.harm <= Harm.ABSENT) else said
        return None

    @property
    def looks_away(self) -> bool:
        """Whether the MTP head was not asked for."""
        return self.raises is None and self.mtp is None

    def _is(self, refused: Outcome) -> bool:
        return not self.raises or refused.raises is None or _bare(refused.raises) in self.raises


def failed(error: str) -> Observed:
    """An engine that stopped, by the line its runner left."""
    name, _, message = error.partition(":")
    names = {name}
    if name == "ValidationError":  # pydantic's, around what a config's own check raised
        names |= {"AssertionError" if "Assertion failed" in message else "ValueError"}
    if _NO_CPU_KERNEL.search(message):
        names = set()
    told = re.sub(r"/\S*/(?=broken/|good/)", "", error)
    return Observed(frozenset(names), told=f"raises {told[:100]}")


def _bare(exception: str) -> str:
    """A name without its module: vLLM's ``regex`` has an ``error`` as ``re`` has."""
    return exception.rpartition(".")[2]


def reference(name: str) -> str:
    """The sound checkpoint that a checkpoint should equal."""
    start = CASES[name][1] if name in CASES else name
    if start in ("base", "compressed-tensors-head4"):
        return start
    return "gptq-w4" if is_gptq(name) else "auto_round-w4"


def seen_in_vllm(name: str, results: Mapping[str, Any]) -> Observed:
    """What vLLM did with a checkpoint, among vllm_batch_runner's results."""
    result = results[name]
    if "error" in result:
        return failed(result["error"])
    equal = _equal(result["outputs"], results[reference(name.partition(":")[0])]["outputs"])
    drafted = result["draft_tokens"]
    rate = result["accepted"] / drafted if drafted else None
    told = f"{equal:.0%} of texts as they should be"
    if rate is not None:
        told += f", {rate:.1%} of drafts accepted"
    return Observed(trunk=equal >= EQUAL, mtp=None if rate is None else rate > ACCEPTED, told=told)


def seen_in_old_vllm(name: str, results: Mapping[str, Any], expected: list[list[int]]) -> Observed:
    """What an old vLLM did, among vllm_old_runner's results; ``expected``: the newest's texts."""
    result = results[name]
    if "error" in result:
        return failed(result["error"])
    first = _equal([[text[0]] for text in expected], result["outputs"])
    drafts = _equal([[text[1]] for text in expected], [[token] for token in result["drafts"]])
    told = f"{first:.0%} of first tokens as they should be, {drafts:.0%} of drafts"
    told += f", {len(result['unloaded'])} parameters of the head not loaded"
    return Observed(trunk=first >= EQUAL, mtp=drafts > 0.5, told=told)


def seen_in_transformers(name: str, results: Mapping[str, Any]) -> Observed:
    """What Transformers did, among transformers_batch_loader's results."""
    result = results[name]
    if "error" in result:
        return failed(result["error"])
    missing = [key for key in result["missing"] if not key.startswith("model.visual.")]
    if missing:
        return Observed(told=f"{len(missing)} missing keys, first {missing[0]}")
    if result["logits"] is None:
        return Observed(runs=False, told="loads, and fails as soon as it runs")
    apart = _distance(result["logits"], results[reference(name)]["logits"])
    return Observed(trunk=apart < ALIKE, told=f"logits {apart:.2f} off")


def run_vllm(corpus: Corpus, python: Path, prompts: list[list[int]], folder: Path) -> Any:
    """vllm_batch_runner's results for NAMES, and for WITHOUT_MTP under 'NAME:0'."""
    jobs = {
        name: job(folder_of(corpus, name), prompts, mtp=name not in DIES_WITH_MTP) for name in NAMES
    }
    for name in WITHOUT_MTP:
        jobs[f"{name}:0"] = job(folder_of(corpus, name), prompts, mtp=False)
    return run_program(python, "vllm_batch_runner.py", jobs, folder)


def run_old_vllm(corpus: Corpus, python: Path, prompts: list[list[int]], folder: Path) -> Any:
    """vllm_old_runner's results for OLD."""
    jobs = {name: job(folder_of(corpus, name), prompts, mtp=True) for name in OLD}
    for each in jobs.values():
        each["mamba_ssm_cache_dtype"] = "float32"
    return run_program(python, "vllm_old_runner.py", jobs, folder)


def run_transformers(
    corpus: Corpus, python: Path, names: Iterable[str], ids: list[list[int]], folder: Path
) -> Any:
    """transformers_batch_loader's results for these checkpoints."""
    checkpoints = {name: str(folder_of(corpus, name)) for name in names}
    return run_program(
        python, "transformers_batch_loader.py", {"ids": ids, "checkpoints": checkpoints}, folder
    )


def folder_of(corpus: Corpus, name: str) -> Path:
    """A checkpoint's folder, sound or broken."""
    return corpus.good(name) if name in GOOD else corpus.broken(name)


def is_gptq(name: str) -> bool:
    """Whether a checkpoint is loaded by optimum, in an environment of its own."""
    return "gptq" in name


def job(model: Path, prompts: list[list[int]], *, mtp: bool) -> dict[str, Any]:
    """What vllm_batch_runner is to do with one checkpoint."""
    return {
        "model": str(model),
        "prompts_token_ids": prompts,
        "max_tokens": 32,
        "mtp": int(mtp),
        "max_model_len": 256,
        "ignore_eos": True,
    }


def run_program(python: Path, program: str, jobs: object, folder: Path) -> Any:
    """What a program beside the engine tests says of jobs; their files are put into a folder."""
    jobs_file, results_file = folder / "jobs.json", folder / "results.json"
    jobs_file.write_text(json.dumps(jobs))
    command = [str(python), str(PROGRAMS / program), str(jobs_file), str(results_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(results_file.read_text())


def _equal(some: list[list[int]], others: list[list[int]]) -> float:
    pairs = list(zip(some, others, strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


def _distance(some: list[list[float]], others: list[list[float]]) -> float:
    squares = [
        (one - other) ** 2
        for row, its in zip(some, others, strict=True)
        for one, other in zip(row, its, strict=True)
    ]
    mean = sum(squares) / len(squares)
    return math.inf if math.isnan(mean) else math.sqrt(mean)
