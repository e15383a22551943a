"""nybble's SignRound against auto-round's on the same rows, iterations and machine, in one run.

    make bench        (or: .venv/bin/python benchmarks/signround_ab.py --repeats 2)

Both quantize the bundled tiny model from one file of texts, each longer than a row; both take
the first tokens of each text, and the hashes of the rows they used are compared. The runs are
interleaved (A B A B). KL divergence is measured by nybble for all results, on held-out text.
Writes docs/benchmarks/signround_ab.json and .md.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    Klds,
    Run,
    long_texts,
    mean_kld,
    measure,
    refuse_other_rows,
    run_nybble,
    run_peer,
    setting,
    table,
    time_ratios,
    write_results,
    write_texts,
)
from transformers import AutoTokenizer

from nybble.demo import bundled_model

OURS, THEIRS, RTN = "nybble", "auto-round", "nybble RTN"


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    rows: int
    seqlen: int
    iters: int
    batch_size: int
    threads: int


def our_overrides(texts: Path, settings: Settings) -> dict[str, object]:
    """The settings as nybble's recipe has them."""
    return {
        "calibration.source": texts,
        "calibration.rows": settings.rows,
        "calibration.seqlen": settings.seqlen,
        "algorithm.iters": settings.iters,
        "algorithm.batch_size": settings.batch_size,
    }


def their_job(texts: Path, settings: Settings) -> dict[str, Any]:
    """The settings as peers/auto_round/run.py takes them."""
    return {
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


def report(settings: Settings, runs: list[Run], klds: Klds) -> str:
    """The Markdown page."""
    text = [
        "# SignRound: nybble against auto-round 0.16.1",
        "",
        f"Bundled tiny model, W4 group 128, {settings.rows} x {settings.seqlen} tokens, "
        f"{settings.iters} iterations x {settings.batch_size} rows, {setting(settings.threads)}",
        "Made by `make bench`.",
        "",
        *table(runs, klds),
        "",
        f"KLD: nybble / nybble RTN = {mean_kld(klds, OURS) / mean_kld(klds, RTN):.2f}, "
        f"nybble / auto-round = {mean_kld(klds, OURS) / mean_kld(klds, THEIRS):.2f}. "
        f"Time, pair by pair: {time_ratios(runs, OURS, THEIRS)}.",
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
    with bundled_model() as base, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        texts = work / "texts.jsonl"
        tokenizer = AutoTokenizer.from_pretrained(base)
        write_texts(texts, long_texts(tokenizer, settings.rows, settings.seqlen))
        runs = [run_nybble(RTN, base, work / "rtn", "w4a16-rtn", {}, settings.threads)]
        ours, theirs = our_overrides(texts, settings), their_job(texts, settings)
        for number in range(args.repeats):
            out = work / f"nybble{number}"
            runs.append(run_nybble(OURS, base, out, "w4a16-autoround", ours, settings.threads))
            runs.append(run_peer(THEIRS, "auto_round", base, work / f"peer{number}", theirs))
            print(f"{runs[-2].wall_seconds:.1f} s, auto-round {runs[-1].wall_seconds:.1f} s")
        refuse_other_rows(runs)
        klds = measure(base, runs[:3])  # the same rows, so the same results
    page = report(settings, runs, klds)
    write_results("signround_ab", page, settings, runs, klds)
    print(page)


if __name__ == "__main__":
    main()
