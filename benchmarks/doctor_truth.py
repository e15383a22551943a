"""What real engines do with sound and broken checkpoints, beside what the doctor foretells.

    bash tools/engine_env/build.sh
    bash tools/loader_env/build.sh
    bash tools/old_engine_env/build.sh 0.24.0        # and 0.28.0, 0.30.0: those that are there run
    .venv/bin/python benchmarks/doctor_truth.py

tests/engine/test_doctor_truth.py asserts the same. Writes docs/benchmarks/doctor_truth.md.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import AutoTokenizer

from nybble.data.rows import build_rows
from nybble.demo import bundled_model
from nybble.doctor.check import check_checkpoint
from nybble.doctor.engines import chosen_engines
from nybble.recipe.schema import Calibration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import doctor_truth as truth
from support.broken_checkpoints import Corpus

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "doctor_truth.md"
HEAD = """# What engines do, and what the doctor foretold

Written by `benchmarks/doctor_truth.py`. Every checkpoint is the bundled tiny model, rounded to
nearest, sound or broken in one way (`tests/support/broken_*.py`). The engines are real: vLLM's
CPU builds with one drafted token, Transformers 5.23 with each format's own package. The doctor
read the files alone. "As it should be" is measured against the sound checkpoint.

In Transformers "no missing keys" leaves out those of the vision tower, which no text needs. Before
0.28 vLLM's CPU build cannot verify drafts of a Gated DeltaNet model, so old releases read prompts
and draft once; their kernel for prompts is replaced by a plain one. Older than 0.24 nothing runs
here: 0.19.1 has no Gated DeltaNet for the CPU at all, and its compiled part loads under torch 2.10
only. Where the doctor names another exception than vLLM on the CPU raises, a CPU kernel was missing
before the named one could come.
"""

Seen = Callable[[str], truth.Observed]


def table(title: str, corpus: Corpus, names: Iterable[str], engine: str, seen: Seen) -> str:
    """One engine's rows; ``engine`` is like 'vllm 0.32'."""
    lines = [f"\n## {title}\n", "| checkpoint | observed | foretold | |", "|---|---|---|---|"]
    for name in names:
        observed = seen(name)
        (verdict,) = check_checkpoint(
            str(truth.folder_of(corpus, name)), engines=chosen_engines(*engine.split()), deep=True
        ).verdicts
        agrees = "no" if observed.contradicts(verdict) else "yes"
        told = observed.told.replace("|", "\\|").replace(str(ROOT), "")
        lines.append(f"| {name} | {told} | {verdict.sentence} | {agrees} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every engine that is installed, and writes the page."""
    with bundled_model() as base, tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = Corpus(base, work / "corpus")
        text = Calibration(source="stdlib-heldout", rows=32, seqlen=48, layout="pack", seed=3)
        rows = build_rows(text, AutoTokenizer.from_pretrained(base)).token_ids
        prompts = rows[:16].tolist()
        newest = truth.run_vllm(corpus, ROOT / ".engine-venv/bin/python", prompts, work)
        page = HEAD + table(
            "vLLM 0.32, MTP on",
            corpus,
            truth.NAMES,
            "vllm 0.32",
            lambda name: truth.seen_in_vllm(name, newest),
        )
        for python, gptq in ((Path(sys.executable), False), (ROOT / ".loader-venv/bin/python", 1)):
            names = [name for name in truth.NAMES if truth.is_gptq(name) == gptq]
            loaded = truth.run_transformers(corpus, python, names, rows[:2, :32].tolist(), work)
            page += table(
                "Transformers 5.23, " + ("gptq" if gptq else "other formats"),
                corpus,
                names,
                "transformers 5.23",
                lambda name, loaded=loaded: truth.seen_in_transformers(name, loaded),
            )
        expected = newest["auto_round-w4"]["outputs"]
        for python in sorted(ROOT.glob(".old-engine-venv/*/bin/python")):
            version = python.parts[-3]
            old = truth.run_old_vllm(corpus, python, prompts, work)
            page += table(
                f"vLLM {version}, MTP on",
                corpus,
                truth.OLD,
                f"vllm {version}",
                lambda name, old=old: truth.seen_in_old_vllm(name, old, expected),
            )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
