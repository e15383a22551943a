"""nybble's SignRound against auto-round's on the same rows, iterations and machine, in one run.

    make bench        (or: .venv/bin/python benchmarks/signround_ab.py --repeats 2)

Both quantize the bundled tiny model from one file of texts, each longer than a row; both take
the first tokens of each text, and the hashes of the rows they used are compared. The runs are
interleaved (A B A B). KL divergence is measured by nybble for all results, on held-out text.
Writes docs/benchmarks/signround_ab.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.data.rows import build_rows
from nybble.data.stdlib import documents
from nybble.demo import HELDOUT, bundled_model
from nybble.engine.load import load_model
from nybble.eval.kld import KldResult, measure_kld
from nybble.recipe.schema import Calibration

ROOT = Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".bench-venv" / "auto_round" / "bin" / "python"
PEER_RUN = ROOT / "benchmarks" / "peers" / "auto_round" / "run.py"
OUT = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    rows: int
    seqlen: int
    iters: int
    batch_size: int
    threads: int


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
    out: str


def write_texts(path: Path, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
    """The first training-split texts of at least twice the row's length, one JSON line each."""
    lines = []
    for text in documents("train"):
        if len(tokenizer(text, verbose=False)["input_ids"]) >= 2 * settings.seqlen:
            lines.append(json.dumps({"text": text}))
        if len(lines) == settings.rows:
            break
    path.write_text("\n".join(lines) + "\n")


def run_nybble(base: Path, texts: Path, out: Path, settings: Settings, recipe: str) -> Run:
    """``nybble quantize`` in a process of its own."""
    command = [sys.executable, "-m", "nybble", "quantize", str(base), "-o", str(out)]
    command += ["--recipe", recipe, "--device", "cpu"]
    if recipe != "w4a16-rtn":
        for key, value in {
            "calibration.source": texts,
            "calibration.rows": settings.rows,
            "calibration.seqlen": settings.seqlen,
            "algorithm.iters": settings.iters,
            "algorithm.batch_size": settings.batch_size,
        }.items():
            command += ["--set", f"{key}={value}"]
    wall = _timed(command, settings.threads)
    manifest = json.loads((out / "nybble.json").read_text())
    return Run(
        tool="nybble RTN" if recipe == "w4a16-rtn" else "nybble",
        wall_seconds=wall,
        inner_seconds=manifest["cost"]["seconds"],
        peak_rss_bytes=manifest["cost"]["peak_rss_bytes"],
        row_sha256=sorted((manifest["calibration"] or {}).get("row_sha256", [])),
        out=str(out),
    )


def run_auto_round(base: Path, texts: Path, out: Path, settings: Settings) -> Run:
    """auto-round in its own environment."""
    job: dict[str, Any] = {
        "model": str(base),
        "out": str(out),
        "dataset": str(texts),
        "nsamples": settings.rows,
        "seqlen": settings.seqlen,
        "iters": settings.iters,
        "batch_size": settings.batch_size,
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "seed": 42,
        "threads": settings.threads,
    }
    job_file, result_file = out.with_suffix(".job"), out.with_suffix(".result")
    job_file.write_text(json.dumps(job))
    command = [str(PEER_PYTHON), str(PEER_RUN), str(job_file), str(result_file)]
    wall = _timed(command, settings.threads)
    result = json.loads(result_file.read_text())
    return Run(
        tool="auto-round",
        wall_seconds=wall,
        inner_seconds=result["seconds_total"],
        peak_rss_bytes=result["peak_rss_bytes"],
        row_sha256=sorted(result["rows"]),
        out=str(out),
    )


def _timed(command: list[str], threads: int) -> float:
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.monotonic() - began


def report(settings: Settings, runs: list[Run], klds: dict[str, KldResult]) -> str:
    """The Markdown page."""
    text = [
        "# SignRound: nybble against auto-round 0.16.1",
        "",
        f"Bundled tiny model, W4 group 128, {settings.rows} x {settings.seqlen} tokens, "
        f"{settings.iters} iterations x {settings.batch_size} rows, {settings.threads} threads, "
        f"{platform.machine()}, Python {platform.python_version()}. Interleaved runs; medians. "
        "KL divergence on held-out text "
        f"({HELDOUT.rows} x {HELDOUT.seqlen} tokens), mean +- standard error over windows.",
        "Made by `make bench`.",
        "",
        "| | mean KLD | same top token | seconds (whole process) | seconds (inside) | peak RSS |",
        "|---|---|---|---|---|---|",
    ]
    for tool, kld in klds.items():
        mine = [run for run in runs if run.tool == tool]
        text.append(
            f"| {tool} | {kld.mean:.5f} +- {kld.standard_error:.5f} | {kld.top1_agreement:.2%} | "
            f"{statistics.median(r.wall_seconds for r in mine):.1f} | "
            f"{statistics.median(r.inner_seconds for r in mine):.1f} | "
            f"{max(r.peak_rss_bytes for r in mine) / 1e6:.0f} MB |"
        )
    ours = [run for run in runs if run.tool == "nybble"]
    theirs = [run for run in runs if run.tool == "auto-round"]
    pairs = list(zip(ours, theirs, strict=True))
    whole = ", ".join(f"{a.wall_seconds / b.wall_seconds:.2f}" for a, b in pairs)
    inner = ", ".join(f"{a.inner_seconds / b.inner_seconds:.2f}" for a, b in pairs)
    text += [
        "",
        f"KLD: nybble / nybble RTN = {klds['nybble'].mean / klds['nybble RTN'].mean:.2f}, "
        f"nybble / auto-round = {klds['nybble'].mean / klds['auto-round'].mean:.2f}. "
        f"Time, pair by pair: nybble / auto-round = {whole} (whole process), {inner} (inside).",
        "",
        "auto-round runs without torch.compile: with it (its default from 10 iterations on), its "
        "compiled Gated DeltaNet pass gives NaN on this CPU and the result is plain rounding.",
        "",
    ]
    return "\n".join(text)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = Settings(args.rows, args.seqlen, args.iters, args.batch_size, args.threads)
    work = Path(tempfile.mkdtemp())
    with bundled_model() as base:
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = work / "texts.jsonl"
        write_texts(texts, tokenizer, settings)
        runs = [run_nybble(base, texts, work / "rtn", settings, "w4a16-rtn")]
        for number in range(args.repeats):
            out = work / f"nybble{number}"
            runs.append(run_nybble(base, texts, out, settings, "w4a16-autoround"))
            runs.append(run_auto_round(base, texts, work / f"auto_round{number}", settings))
            print(f"{runs[-2].wall_seconds:.1f} s, auto-round {runs[-1].wall_seconds:.1f} s")
        if len({tuple(run.row_sha256) for run in runs[1:]}) != 1:
            raise SystemExit("the two tools did not use the same calibration rows")
        model = load_model(base)
        windows = build_rows(Calibration(**HELDOUT.model_dump()), tokenizer).token_ids
        klds = {
            run.tool: measure_kld(model, load_model(Path(run.out)), windows) for run in runs[:3]
        }
    OUT.mkdir(parents=True, exist_ok=True)
    page = report(settings, runs, klds)
    (OUT / "signround_ab.md").write_text(page)
    shown = [
        {k: v for k, v in asdict(run).items() if k not in ("row_sha256", "out")} for run in runs
    ]
    figures = {
        "settings": asdict(settings),
        "runs": shown,
        "kld": {tool: asdict(kld) for tool, kld in klds.items()},
    }
    (OUT / "signround_ab.json").write_text(json.dumps(figures, indent=1) + "\n")
    shutil.rmtree(work)
    print(page)


if __name__ == "__main__":
    main()
