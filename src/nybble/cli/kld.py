"""``nybble kld``: how far checkpoints are from their base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.table import Table

from nybble.cli.progress import pass_display
from nybble.cli.tables import console, human_bytes, table
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import RecipeError
from nybble.engine.device import resolve_device
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval.measure import (
    KldReport,
    Measured,
    Settings,
    measure_candidate,
    reference_of,
    report,
    truth_of_base,
    truth_of_file,
)
from nybble.eval.reference import save_reference
from nybble.eval.statistics import KldStatistics
from nybble.eval.texts import Text
from nybble.report.kld_curves import Divergence, Floor
from nybble.report.kld_plot import Heading, write_kld_plot
from nybble.report.style import check_plot_file, names_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHOWN_WORST = 5


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    base: Path
    candidates: tuple[Path, ...]
    text: Text
    device: str
    dtype: str
    top_k: int | None
    noise: bool
    allow_overlap: bool
    head: Path | None
    save_reference: Path | None
    json_file: Path | None
    plot: Path | None


def run(request: Request) -> None:
    """Measures, prints tables, and writes what was asked for."""
    if request.dtype not in _DTYPES:
        raise RecipeError(f"dtype {request.dtype!r} is unknown: give {' or '.join(_DTYPES)}")
    _check_plot(request)
    how = Arithmetic(resolve_device(request.device), _DTYPES[request.dtype])
    settings = Settings(how, request.top_k, request.noise, request.allow_overlap)
    with ExitStack() as stack, pass_display() as on_pass:
        if request.base.is_file():
            head = stack.enter_context(ModelWeights(request.head)) if request.head else None
            truth = truth_of_file(request.base, head)
        else:
            base = stack.enter_context(ModelWeights(request.base))
            truth = truth_of_base(base, request.text, settings, on_pass, request.candidates)
            if request.save_reference is not None:
                save_reference(request.save_reference, reference_of(truth, how))
        measured = [
            measure_candidate(truth, path, settings, on_pass) for path in request.candidates
        ]
    found = report(truth, measured, how)
    if request.json_file is not None:
        content = TypeAdapter(KldReport).dump_json(found, indent=2) + b"\n"
        write_bytes_atomic(request.json_file, content)
    if request.plot is not None:
        _plot(request.plot, found)
    print_report(found)
    if request.plot is not None:
        console.print(f"\nThe figure is in {request.plot}", soft_wrap=True)


def _check_plot(request: Request) -> None:
    """Before hours of work."""
    if request.plot is not None:
        check_plot_file(request.plot)
        if not request.candidates:
            raise RecipeError("--plot draws checkpoints, and none was given")


def _plot(path: Path, found: KldReport) -> None:
    names = names_of([candidate.checkpoint for candidate in found.candidates])
    divergences = []
    for name, one in zip(names, found.candidates, strict=True):
        by_window = one.scores.kld.view(one.scores.num_windows, -1)
        divergences.append(Divergence(name, one.weight_bytes, by_window.numpy(force=True)))
    floors = [Floor(f.how, f.mean, f.median, f.p99) for f in found.noise]
    heading = Heading(
        title=f"KL divergence from {names_of([found.base])[0]}",
        conditions=f"{found.positions:,} positions: {found.text}; {found.arithmetic}",
    )
    if found.candidates[0].full is None:
        heading = Heading(
            title=heading.title,
            conditions=f"{heading.conditions}; a lower bound, of {found.top_k} tokens",
            measure="truncated KL divergence (nats)",
        )
    write_kld_plot(path, heading, divergences, floors)


def print_report(found: KldReport) -> None:
    """Conditions, one line per checkpoint, and the worst positions."""
    console.print(
        f"KL(base || checkpoint) in nats, {found.positions:,} positions: {found.text}; "
        f"{found.arithmetic}\nbase {found.base}\n",
        soft_wrap=True,
    )
    if found.candidates:
        console.print(_figures(found))
        _print_worst(found)
    if found.coverage is not None:
        console.print(
            f"\nthe base's {found.top_k} most likely tokens hold {found.coverage:.5f} of its mass "
            "on average; a truncated figure is a lower bound of the full one"
        )


def _figures(found: KldReport) -> Table:
    """A line per figure, a column per checkpoint."""
    made = table(["nats"], [Path(candidate.checkpoint).name for candidate in found.candidates])
    for name, figure in _DIVERGENCES.items():
        made.add_row(name, *(f"{figure(candidate.best):.6f}" for candidate in found.candidates))
    if any(candidate.full and candidate.truncated for candidate in found.candidates):
        gaps = [(c.full, c.truncated) for c in found.candidates]
        made.add_row(
            f"Mean KLD, top {found.top_k}", *(f"{t.kld.mean:.6f}" if t else "" for _, t in gaps)
        )
        made.add_row(
            "full less truncated",
            *(f"{f.kld.mean - t.kld.mean:.6f}" if f and t else "" for f, t in gaps),
        )
    for floor in found.noise:
        below = [
            "below twice this" if c.best.kld.mean < 2 * floor.mean else "" for c in found.candidates
        ]
        made.add_row(f"base, {floor.how}: {floor.mean:.6f}", *below)
    made.add_section()
    for name, show in _PREDICTIONS.items():
        made.add_row(name, *(show(candidate.best) for candidate in found.candidates))
    made.add_row("size", *(human_bytes(c.weight_bytes) for c in found.candidates))
    for number, bucket in enumerate(found.candidates[0].best.buckets):
        made.add_row(
            f"Mean KLD, base's top p {bucket.low:g}-{bucket.high:g} ({bucket.positions:,})",
            *(f"{c.best.buckets[number].mean_kld:.6f}" for c in found.candidates),
        )
    return made


# Called as llama.cpp calls them.
_DIVERGENCES: dict[str, Callable[[KldStatistics], float]] = {
    "Mean KLD": lambda figures: figures.kld.mean,
    "+- (standard error)": lambda figures: figures.kld.standard_error,
    "Median KLD": lambda figures: figures.quantiles["median"],
    "90 % KLD": lambda figures: figures.quantiles["p90"],
    "95 % KLD": lambda figures: figures.quantiles["p95"],
    "99 % KLD": lambda figures: figures.quantiles["p99"],
    "99.9 % KLD": lambda figures: figures.quantiles["p99_9"],
    "Maximum KLD": lambda figures: figures.max,
}
_PREDICTIONS: dict[str, Callable[[KldStatistics], str]] = {
    "Same top p": lambda figures: f"{figures.same_top.mean:.2%}",
    "RMS dp": lambda figures: f"{figures.rms_delta_p:.2%}",
    "Mean PPL": lambda figures: f"{figures.candidate_perplexity:.4f}",
    "Mean PPL of the base": lambda figures: f"{figures.base_perplexity:.4f}",
}


def _print_worst(found: KldReport) -> None:
    for candidate in found.candidates:
        console.print(f"\nworst positions of {Path(candidate.checkpoint).name}:")
        _print_positions(candidate)


def _print_positions(candidate: Measured) -> None:
    made = table(["text so far", "text", "base", "checkpoint"], ["KLD"])
    for position in candidate.worst[:_SHOWN_WORST]:
        made.add_row(
            repr(position.before)[1:-1][-48:],
            repr(position.token),
            repr(position.base_top),
            repr(position.candidate_top),
            f"{position.worst.kld:.3f}",
        )
    console.print(made)
