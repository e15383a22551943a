"""``nybble accept``: how many MTP drafts checkpoints accept, and what drafting is worth."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.table import Table

from nybble.cli.progress import progress_bar
from nybble.cli.tables import console, human_bytes, table
from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import RecipeError
from nybble.engine.device import resolve_device
from nybble.engine.stream import Arithmetic
from nybble.eval.accept import (
    RANDOM_HEAD,
    AcceptReport,
    ClassFigures,
    Counted,
    Figures,
    Measured,
    OnStep,
    Settings,
    measure,
    refuse_unmeasurable,
    report,
)
from nybble.eval.classes import ClassTexts, bundled_classes, given_classes
from nybble.eval.texts import open_tokenizer, tokenizer_sha256
from nybble.report.acceptance_plot import DraftRates, write_acceptance_plot
from nybble.report.style import check_plot_file, names_of

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    checkpoints: tuple[Path, ...]
    num_drafts: int
    texts: tuple[str, ...]
    """NAME=SOURCE; none: the bundled classes."""
    windows: int
    seqlen: int
    new_tokens: int | None
    """None: on given text only."""
    allow_overlap: bool
    minimum: float | None
    device: str
    dtype: str
    json_file: Path | None
    plot: Path | None


def run(request: Request) -> int:
    """Measures, prints tables and writes the report; returns 1 if a rate is below the minimum."""
    if request.plot is not None:
        check_plot_file(request.plot)
    settings = _settings(request)
    first = request.checkpoints[0]
    found = _class_texts(request, first)
    refuse_unmeasurable(request.checkpoints, found.texts, settings)
    with _step_display() as on_step:
        measured = [
            measure(folder, found.texts, settings, on_step) for folder in request.checkpoints
        ]
    made = report(found, tokenizer_sha256(first), settings, measured)
    if request.json_file is not None:
        content = TypeAdapter(AcceptReport).dump_json(made, indent=2) + b"\n"
        write_bytes_atomic(request.json_file, content)
    if request.plot is not None:
        _plot(request.plot, made)
    print_report(made)
    if request.plot is not None:
        console.print(f"\nThe figure is in {request.plot}", soft_wrap=True)
    return _judge(made.checkpoints, request.minimum)


def _plot(path: Path, found: AcceptReport) -> None:
    """A panel over all classes, and one for each of several."""
    names = names_of([one.checkpoint for one in found.checkpoints])
    texts = {"all classes": [one.overall for one in found.checkpoints]}
    if len(found.texts) > 1:
        for text in found.texts:
            texts[text.name] = [one.classes[text.name] for one in found.checkpoints]
    panels = {
        text: [
            _line(name, way, figures(one))
            for name, one in zip(names, measured, strict=True)
            for way, figures in _ways(found).items()
        ]
        for text, measured in texts.items()
    }
    conditions = f"{found.num_drafts} drafts a step; {found.arithmetic}"
    write_acceptance_plot(path, "MTP drafts accepted", conditions, panels)


def _line(checkpoint: str, way: str, figures: Figures | Counted) -> DraftRates:
    errors = figures.standard_errors if isinstance(figures, Figures) else ()
    return DraftRates(checkpoint, way, figures.rates, errors)


def print_report(found: AcceptReport) -> None:
    """Conditions, figures over all classes, and by class."""
    console.print(f"MTP drafts, {found.num_drafts} a step; {found.arithmetic}", soft_wrap=True)
    for text in found.texts:
        console.print(
            f"  {text.name}: {text.windows} windows of {text.seqlen} tokens of {text.source}, "
            f"{text.positions:,} positions",
            soft_wrap=True,
        )
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True)
    console.print()
    console.print(_overall(found))
    console.print(f"\n{_EXPLAINED} {_speed_source(found)}\n")
    console.print(_by_class(found))


_EXPLAINED = (
    "A rate is the share of steps whose drafts up to this one are all accepted, +- its standard "
    "error by window. greedy: a draft must be the trunk's most likely token. sampled: temperature "
    "1, sum of min(p, q). Both are on the given text, where every class weighs the same. The cost "
    "of a draft is what it reads of the weights, over what the trunk reads; where that decides, "
    "one sequence is faster by tokens per step / (1 + drafts x cost)."
)


def _speed_source(found: AcceptReport) -> str:
    if found.new_tokens is None:
        return "Here that is of the greedy rates."
    return (
        f"on policy: {found.prompt_tokens} tokens of each window, continued greedily by "
        f"{found.new_tokens}; the speed-up is of these rates."
    )


def _overall(found: AcceptReport) -> Table:
    """A line per figure, a column per checkpoint."""
    made = _columns("all classes", found)
    for way, figures in _ways(found).items():
        for draft in range(found.num_drafts):
            cells = [_rate(figures(one.overall), draft) for one in found.checkpoints]
            made.add_row(f"{way}, draft {draft + 1}", *cells)
        lengths = [f"{figures(one.overall).tokens_per_step:.3f}" for one in found.checkpoints]
        made.add_row(f"{way}, tokens per step", *lengths)
        made.add_row()
    made.add_row("cost of a draft", *(f"{c.speed_up.draft_cost:.4f}" for c in found.checkpoints))
    for draft in range(found.num_drafts):
        cells = [f"{one.speed_up.expected[draft]:.2f}x" for one in found.checkpoints]
        made.add_row(f"speed-up, {draft + 1} a step", *cells)
    made.add_row(
        "fastest, drafts a step", *(str(c.speed_up.best_drafts) for c in found.checkpoints)
    )
    made.add_row("size", *(human_bytes(c.weight_bytes) for c in found.checkpoints))
    return made


def _by_class(found: AcceptReport) -> Table:
    made = _columns("drafts in a row, %", found)
    for way, figures in _ways(found).items():
        for text in found.texts:
            cells = [
                " ".join(f"{rate:.0%}"[:-1] for rate in figures(one.classes[text.name]).rates)
                for one in found.checkpoints
            ]
            made.add_row(f"{text.name}, {way}", *cells)
    return made


Way = Callable[[ClassFigures], Figures | Counted]


def _ways(found: AcceptReport) -> dict[str, Way]:
    ways: dict[str, Way] = {
        "greedy": lambda figures: figures.greedy,
        "sampled": lambda figures: figures.sampled,
    }
    if found.new_tokens is not None:
        ways["on policy"] = _on_policy
    return ways


def _on_policy(figures: ClassFigures) -> Counted:
    assert figures.on_policy is not None
    return figures.on_policy


def _columns(title: str, found: AcceptReport) -> Table:
    return table([title], [Path(one.checkpoint).name for one in found.checkpoints])


def _rate(figures: Figures | Counted, draft: int) -> str:
    rate = f"{figures.rates[draft]:.1%}"
    if isinstance(figures, Counted) or math.isnan(figures.standard_errors[draft]):
        return rate
    return f"{rate} +- {figures.standard_errors[draft]:.1%}"


def _judge(measured: Sequence[Measured], minimum: float | None) -> int:
    """Says what is wrong with rates; returns the exit code."""
    for one in measured:
        if one.first_draft < RANDOM_HEAD:
            console.print(
                f"\n{one.checkpoint} accepts {one.first_draft:.1%} of first drafts: its head looks "
                f"random; run: nybble check {one.checkpoint}",
                soft_wrap=True,
            )
    failed = [one for one in measured if minimum is not None and one.first_draft < minimum]
    for one in failed:
        console.print(
            f"\n{one.checkpoint} fails: it accepts {one.first_draft:.1%} of first drafts, "
            f"less than the {minimum:.1%} of --min",
            soft_wrap=True,
        )
    return 1 if failed else 0


def _settings(request: Request) -> Settings:
    if request.dtype not in _DTYPES:
        raise RecipeError(f"dtype {request.dtype!r} is unknown: give {' or '.join(_DTYPES)}")
    if request.new_tokens is not None and request.new_tokens <= request.num_drafts:
        raise RecipeError(
            f"--new-tokens {request.new_tokens} leaves no room for {request.num_drafts} drafts"
        )
    how = Arithmetic(resolve_device(request.device), _DTYPES[request.dtype])
    return Settings(how, request.num_drafts, request.new_tokens, request.allow_overlap)


def _class_texts(request: Request, folder: Path) -> ClassTexts:
    tokenizer = open_tokenizer(folder)
    if not request.texts:
        return bundled_classes(tokenizer, request.windows, request.seqlen)
    sources: dict[str, str] = {}
    for text in request.texts:
        name, _, source = text.partition("=")
        if not name or not source:
            raise RecipeError(f"--text {text!r} is not CLASS=SOURCE, like prose=novel.txt")
        if name in sources:
            raise RecipeError(f"--text names the class {name!r} twice")
        sources[name] = source
    return given_classes(sources, tokenizer, request.windows, request.seqlen)


@contextmanager
def _step_display() -> Iterator[OnStep]:
    """A bar on a terminal, else a line for each part that is done."""
    with progress_bar() as show:

        def on_step(what: str, done: int, of: int) -> None:
            if show is not None:
                show(done / of, what)
            elif done == of:
                sys.stderr.write(f"{what}: done\n")

        yield on_step
