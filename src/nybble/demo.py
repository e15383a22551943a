"""The demo's work: quantize the bundled tiny model, then measure what was lost.

The model and the rows are small enough to hold base and result in memory together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.data.rows import build_rows
from nybble.engine.generate import generate_greedy
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.stream import Arithmetic
from nybble.eval.acceptance import AcceptanceResult, measure_acceptance
from nybble.eval.compare import compare
from nybble.eval.statistics import KldStatistics, statistics
from nybble.pipeline.events import OnEvent
from nybble.pipeline.manifest import peak_rss_bytes
from nybble.pipeline.quantize import quantize
from nybble.recipe.load import load_recipe
from nybble.recipe.schema import Calibration

RECIPE = "tiny-demo"
HELDOUT = Calibration(source="stdlib-heldout", rows=32, seqlen=256, layout="pack", seed=1)
PROMPT_TOKENS = 64
NEW_TOKENS = 64
NUM_SAMPLES = 10


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured."""

    out: Path
    already_finished: bool
    quantize_seconds: float
    peak_rss_bytes: int
    base_bytes: int
    result_bytes: int
    kld: KldStatistics
    base_acceptance: AcceptanceResult
    result_acceptance: AcceptanceResult
    samples: tuple[tuple[str, str], ...]
    """The last line of a held-out prompt, and its completion by the quantized model."""


@contextmanager
def bundled_model() -> Iterator[Path]:
    """Folder of the tiny model that comes with nybble."""
    with resources.as_file(resources.files("nybble") / "assets" / "tiny") as folder:
        yield folder


def run_demo(out: Path, on_event: OnEvent) -> DemoResult:
    """Quantizes to ``out`` (or finds it finished) and measures on held-out text."""
    with bundled_model() as base_folder:
        began = time.monotonic()
        made = quantize(base_folder, out, load_recipe(RECIPE), "cpu", on_event)
        seconds = time.monotonic() - began
        peak = peak_rss_bytes()
        tokenizer = AutoTokenizer.from_pretrained(base_folder, local_files_only=True)
        windows = build_rows(HELDOUT, tokenizer).token_ids
        kld = statistics(compare(base_folder, out, windows, Arithmetic(torch.device("cpu"))))
        base, result = load_model(base_folder), load_model(out)
        base_bytes = _weight_bytes(base_folder)
    prompts = windows[:, :PROMPT_TOKENS]
    return DemoResult(
        out=out,
        already_finished=made.already_finished,
        quantize_seconds=seconds,
        peak_rss_bytes=peak,
        base_bytes=base_bytes,
        result_bytes=_weight_bytes(out),
        kld=kld,
        base_acceptance=measure_acceptance(base, prompts, NEW_TOKENS),
        result_acceptance=measure_acceptance(result, prompts, NEW_TOKENS),
        samples=tuple(sample(result, tokenizer, row) for row in prompts[:NUM_SAMPLES]),
    )


def sample(
    model: LoadedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor
) -> tuple[str, str]:
    """The last line of a prompt, int64 [T], and its greedy completion up to the line's end."""
    tokens = generate_greedy(model, prompt[None], num_new=32)[0]
    start, whole = tokenizer.decode(prompt), tokenizer.decode(tokens)
    assert isinstance(start, str)
    assert isinstance(whole, str)
    completion = whole.removeprefix(start)
    return start.splitlines()[-1], completion[:1] + completion[1:].partition("\n")[0]


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
