"""``nybble quantize``: runs the pipeline and shows how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.cli.inspect import print_architecture, print_sizes
from nybble.cli.plan_table import plan_table
from nybble.cli.progress import progress_bar
from nybble.cli.tables import console, human_bytes, human_seconds
from nybble.packing.formats import FORMATS
from nybble.pipeline.algorithms import MIN_TOKENS
from nybble.pipeline.estimate import estimate
from nybble.pipeline.events import OnEvent, Step
from nybble.pipeline.manifest import peak_rss_bytes
from nybble.pipeline.quantize import QUANT_LOG, quantize
from nybble.recipe.load import load_recipe
from nybble.recipe.schema import Recipe

__all__ = ["load_recipe", "print_estimate", "run"]


def run(model: Path, out: Path, recipe: Recipe, device: str) -> None:
    """Quantizes with a progress display on standard error."""
    began = time.monotonic()
    with progress_display() as on_event:
        result = quantize(model, out, recipe, device, on_event)
    if result.already_finished:
        console.print(f"{out} already holds this result; nothing to do", soft_wrap=True)
        return
    if result.starved_experts:
        fate = ", were rounded to nearest" if recipe.algorithm.name == "gptq" else ""
        console.print(
            f"{result.starved_experts} of {result.experts} experts saw fewer than {MIN_TOKENS} "
            f"calibration tokens{fate}: use more rows (column tokens of {out / QUANT_LOG})",
            soft_wrap=True,
        )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(
        f"{out}: {human_bytes(size)}, in {human_seconds(time.monotonic() - began)}, "
        f"peak memory {human_bytes(peak_rss_bytes())}",
        soft_wrap=True,
    )


def print_estimate(model: Path, recipe: Recipe, device: str) -> None:
    """Prints what a run would do and need."""
    needs = estimate(model, recipe, device)
    console.print(recipe.summary())
    print_architecture(needs.arch)
    console.print(plan_table(needs.arch, needs.plan, FORMATS[recipe.format], every_tensor=False))
    print_sizes(needs.plan, recipe)
    console.print(
        f"memory: {human_bytes(needs.block_bytes)} for the largest block and its training, "
        f"{human_bytes(needs.stream_bytes)} for the calibration rows, beside one batch's "
        "activations and the libraries"
    )
    console.print(f"disk: {human_bytes(needs.output_bytes)}")
    console.print(f"time: about {human_seconds(needs.seconds)}, from a trial on this machine")


@contextmanager
def progress_display() -> Iterator[OnEvent]:
    """A live bar on a terminal, else one plain line per block."""
    with progress_bar() as bar:

        def show(event: Step) -> None:
            if bar is None:
                _plain_line(event)
                return
            loss = "" if event.loss is None else f"  loss {event.loss:.3g}"
            memory = human_bytes(peak_rss_bytes())
            bar(
                event.share_done, f"block {event.block + 1}/{event.num_blocks}{loss}  peak {memory}"
            )

        yield show


def _plain_line(event: Step) -> None:
    if event.step == event.num_steps:
        loss = "" if event.loss is None else f", loss {event.loss:.3g}"
        sys.stderr.write(f"block {event.block + 1}/{event.num_blocks} done{loss}\n")
