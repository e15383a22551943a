"""What the comparisons with other tools share: texts, timed runs, KL divergences, the page.

Every tool quantizes the bundled tiny model in a process of its own; KL divergence is measured by
nybble for all results, on held-out text.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.data.rows import build_rows
from nybble.data.stdlib import documents
from nybble.demo import HELDOUT
from nybble.engine.stream import Arithmetic
from nybble.eval.compare import compare
from nybble.eval.statistics import KldStatistics
from nybble.eval.statistics import statistics as kld_statistics
from nybble.recipe.schema import Calibration

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "benchmarks"


Klds = Mapping[str, list[KldStatistics]]
"""By tool, in the order of its runs."""


@dataclass(frozen=True)
class Run:
    """One quantization."""

    tool: str
    wall_seconds: float
    """The whole process, start to exit."""
    inner_seconds: float
    """As the tool reports it, without start-up and imports."""
    peak_rss_bytes: int
    row_sha256: list[str]
    """Of the calibration rows it used, sorted; empty if it uses none."""
    out: str


def long_texts(tokenizer: PreTrainedTokenizerBase, count: int, seqlen: int) -> list[str]:
    """The first training-split texts of at least twice the row's length."""
    texts = []
    for text in documents("train"):
        if len(tokenizer(text, verbose=False)["input_ids"]) >= 2 * seqlen:
            texts.append(text)
        if len(texts) == count:
            return texts
    raise SystemExit(f"only {len(texts)} texts of {2 * seqlen} tokens, {count} wanted")


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """One JSON line each, as all tools read them."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def run_nybble(
    tool: str, base: Path, out: Path, recipe: str, overrides: Mapping[str, object], threads: int
) -> Run:
    """``nybble quantize``; ``tool`` is what the page calls it."""
    command = [sys.executable, "-m", "nybble", "quantize", str(base), "-o", str(out)]
    command += ["--recipe", recipe, "--device", "cpu"]
    for key, value in overrides.items():
        command += ["--set", f"{key}={value}"]
    wall = _timed(command, threads)
    manifest = json.loads((out / "nybble.json").read_text())
    return Run(
        tool=tool,
        wall_seconds=wall,
        inner_seconds=manifest["cost"]["seconds"],
        peak_rss_bytes=manifest["cost"]["peak_rss_bytes"],
        row_sha256=sorted((manifest["calibration"] or {}).get("row_sha256", [])),
        out=str(out),
    )


def run_peer(tool: str, peer: str, base: Path, out: Path, job: Mapping[str, Any]) -> Run:
    """``benchmarks/peers/PEER/run.py`` in the environment that peers/build_env.sh makes for it."""
    job_file, result_file = out.with_suffix(".job"), out.with_suffix(".result")
    job_file.write_text(json.dumps({"model": str(base), "out": str(out), **job}))
    python = ROOT / ".bench-venv" / peer / "bin" / "python"
    program = ROOT / "benchmarks" / "peers" / peer / "run.py"
    wall = _timed([str(python), str(program), str(job_file), str(result_file)], job["threads"])
    result = json.loads(result_file.read_text())
    return Run(
        tool=tool,
        wall_seconds=wall,
        inner_seconds=result["seconds_total"],
        peak_rss_bytes=result["peak_rss_bytes"],
        row_sha256=sorted(result["rows"]),
        out=str(out),
    )


def refuse_other_rows(runs: Iterable[Run]) -> None:
    """Ends the program unless all calibrated runs used the same rows."""
    if len({tuple(run.row_sha256) for run in runs if run.row_sha256}) != 1:
        raise SystemExit("the tools did not use the same calibration rows")


def measure(base: Path, runs: Iterable[Run]) -> Klds:
    """KL divergence of every result."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = build_rows(Calibration(**HELDOUT.model_dump()), tokenizer).token_ids
    klds: dict[str, list[KldStatistics]] = {}
    for run in runs:
        scores = compare(base, Path(run.out), windows, Arithmetic(torch.device("cpu")))
        klds.setdefault(run.tool, []).append(kld_statistics(scores))
    return klds


def mean_kld(klds: Klds, tool: str) -> float:
    """Mean over a tool's results."""
    return statistics.mean(kld.kld.mean for kld in klds[tool])


def setting(threads: int) -> str:
    """Where and how the figures were made, for the head of a page."""
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return (
        f"{count}, {platform.machine()}, Python {platform.python_version()}. "
        "Interleaved runs; median times. KL divergence on held-out text "
        f"({HELDOUT.rows} x {HELDOUT.seqlen} tokens), mean +- standard error over windows."
    )


def table(runs: list[Run], klds: Klds) -> list[str]:
    """Lines of a Markdown table, one row for each tool."""
    lines = [
        "| | mean KLD | same top token | seconds (whole process) | seconds (inside) | peak RSS |",
        "|---|---|---|---|---|---|",
    ]
    for tool, results in klds.items():
        mine = [run for run in runs if run.tool == tool]
        error = statistics.mean(kld.kld.standard_error for kld in results)
        top1 = statistics.mean(kld.same_top.mean for kld in results)
        lines.append(
            f"| {tool} | {mean_kld(klds, tool):.5f} +- {error:.5f} | {top1:.2%} | "
            f"{statistics.median(r.wall_seconds for r in mine):.1f} | "
            f"{statistics.median(r.inner_seconds for r in mine):.1f} | "
            f"{max(r.peak_rss_bytes for r in mine) / 1e6:.0f} MB |"
        )
    return lines


def time_ratios(runs: list[Run], ours: str, theirs: str) -> str:
    """Seconds of one tool over another's, pair by pair."""
    pairs = list(
        zip(
            [run for run in runs if run.tool == ours],
            [run for run in runs if run.tool == theirs],
            strict=True,
        )
    )
    whole = ", ".join(f"{a.wall_seconds / b.wall_seconds:.2f}" for a, b in pairs)
    inner = ", ".join(f"{a.inner_seconds / b.inner_seconds:.2f}" for a, b in pairs)
    return f"{ours} / {theirs} = {whole} (whole process), {inner} (inside)"


def write_results(name: str, page: str, settings: Any, runs: list[Run], klds: Klds) -> None:
    """The page, and its figures as JSON, in docs/benchmarks."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{name}.md").write_text(page)
    shown = [
        {key: value for key, value in asdict(run).items() if key not in ("row_sha256", "out")}
        for run in runs
    ]
    figures = {
        "settings": asdict(settings),
        "runs": shown,
        "kld": {tool: [asdict(kld) for kld in results] for tool, results in klds.items()},
    }
    (OUT / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def _timed(command: list[str], threads: int) -> float:
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - began
