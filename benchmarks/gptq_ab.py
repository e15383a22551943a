"""nybble's GPTQ against llm-compressor's on the same rows and machine, in one run.

    bash benchmarks/peers/build_env.sh llm_compressor
    .venv/bin/python benchmarks/gptq_ab.py

Both quantize the bundled tiny model to W4 group 128 with the same damping and blocks of 128
columns, with and without activation order. nybble runs with plain min-max scales of positive sign,
almost llm-compressor's, and as its recipe has it. Each repeat has other texts: the choice of
text moves the result more than the error of its measurement. The hashes of the rows they used are
compared; the runs are interleaved. KL divergence is measured by nybble for all results, on
held-out text. Writes docs/benchmarks/gptq_ab.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
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

from nybble.data.rows import build_rows
from nybble.demo import bundled_model
from nybble.recipe.schema import Calibration

RTN = "nybble RTN"
RECIPE = "nybble, as w4a16-gptq"
OURS = "nybble"
THEIRS = "llm-compressor"
NO_ORDER = ", no act-order"
PLAIN_SCALES = {"algorithm.scale_init": "minmax", "scheme.signed_scales": "false"}


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    rows: int
    seqlen: int
    damp: float
    batch_size: int
    """Rows in one forward pass of llm-compressor."""
    threads: int


def calibration_of(texts: Path, settings: Settings) -> Calibration:
    """The rows of both sides."""
    return Calibration(
        source=str(texts), rows=settings.rows, seqlen=settings.seqlen, layout="truncate"
    )


def our_overrides(texts: Path, settings: Settings) -> dict[str, object]:
    """The settings as nybble's recipe has them."""
    calibration = calibration_of(texts, settings)
    return {
        "calibration.source": texts,
        "calibration.rows": calibration.rows,
        "calibration.seqlen": calibration.seqlen,
        "calibration.layout": calibration.layout,
        "algorithm.damp": settings.damp,
    }


def their_job(rows: Path, settings: Settings, actorder: str | None) -> dict[str, Any]:
    """The settings as peers/llm_compressor/run.py takes them."""
    return {
        "rows": str(rows),
        "bits": 4,
        "group_size": 128,
        "actorder": actorder,
        "damp": settings.damp,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
    }


def one_round(base: Path, work: Path, settings: Settings) -> list[Run]:
    """Every tool once; ``work`` has texts.jsonl and rows.jsonl."""
    given = our_overrides(work / "texts.jsonl", settings)

    def ours(tool: str, changes: Mapping[str, object]) -> Run:
        out = Path(tempfile.mkdtemp(dir=work)) / "out"
        return run_nybble(tool, base, out, "w4a16-gptq", {**given, **changes}, settings.threads)

    def theirs(tool: str, actorder: str | None) -> Run:
        out = Path(tempfile.mkdtemp(dir=work)) / "out"
        job = their_job(work / "rows.jsonl", settings, actorder)
        return run_peer(tool, "llm_compressor", base, out, job)

    return [
        ours(RECIPE, {}),
        ours(OURS, PLAIN_SCALES),
        theirs(THEIRS, "static"),
        ours(OURS + NO_ORDER, {**PLAIN_SCALES, "algorithm.act_order": "false"}),
        theirs(THEIRS + NO_ORDER, None),
    ]


def kld_ratios(klds: Klds, one: str, other: str) -> str:
    """KL divergences of one tool over another's, repeat by repeat."""
    pairs = zip(klds[one], klds[other], strict=True)
    each = ", ".join(f"{a.kld.mean / b.kld.mean:.2f}" for a, b in pairs)
    return f"{one} / {other} = {mean_kld(klds, one) / mean_kld(klds, other):.2f} ({each})"


def report(settings: Settings, runs: list[Run], klds: Klds) -> str:
    """The Markdown page."""
    repeats = len(klds[OURS])
    text = [
        "# GPTQ: nybble against llm-compressor 0.14.0.1",
        "",
        f"Bundled tiny model, W4 group 128, {settings.rows} x {settings.seqlen} tokens, damping "
        f"{settings.damp}, {repeats} repeats, each with other texts; {setting(settings.threads)}",
        "Made by `benchmarks/gptq_ab.py`.",
        "",
        *table(runs, klds),
        "",
        f"KLD, mean and repeat by repeat: {kld_ratios(klds, OURS, THEIRS)}; "
        f"{kld_ratios(klds, OURS + NO_ORDER, THEIRS + NO_ORDER)}; "
        f"{kld_ratios(klds, RECIPE, THEIRS)}.",
        "",
        f"Time, pair by pair: {time_ratios(runs, OURS, THEIRS)}; "
        f"{time_ratios(runs, OURS + NO_ORDER, THEIRS + NO_ORDER)}.",
        "",
        f"`{OURS}` has positive min-max scales, under which no weight is clipped: the larger of "
        "max / 7 and -min / 8. llm-compressor's are max |w| / 7.5, which clips the largest weights "
        f"a little. `{RECIPE}` has signed scales that weigh errors by the inputs. llm-compressor "
        f"runs the model in its own type, bfloat16, {settings.batch_size} rows at a time; nybble "
        "in float32, as always on a CPU.",
        "",
    ]
    return "\n".join(text)


def main() -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = Settings(args.rows, args.seqlen, args.damp, args.batch_size, args.threads)
    with bundled_model() as base, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = long_texts(tokenizer, args.repeats * settings.rows, settings.seqlen)
        runs = [run_nybble(RTN, base, work / "rtn", "w4a16-rtn", {}, settings.threads)]
        for number in range(args.repeats):
            write_texts(work / "texts.jsonl", texts[number :: args.repeats])
            rows = build_rows(calibration_of(work / "texts.jsonl", settings), tokenizer)
            lines = [json.dumps(row) + "\n" for row in rows.token_ids.tolist()]
            (work / "rows.jsonl").write_text("".join(lines))
            done = one_round(base, work, settings)
            refuse_other_rows(done)
            runs += done
            print(", ".join(f"{run.tool}: {run.wall_seconds:.1f} s" for run in done), flush=True)
        klds = measure(base, runs)
    page = report(settings, runs, klds)
    write_results("gptq_ab", page, settings, runs, klds)
    print(page)


if __name__ == "__main__":
    main()
