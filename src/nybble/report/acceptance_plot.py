"""How many MTP drafts are accepted, by their position in a step, as one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nybble.report.style import (
    DASHED,
    DOTTED,
    INK,
    SOLID,
    Style,
    checkpoint_style,
    legend_above,
    short,
    shown,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES = (SOLID, DASHED, DOTTED)
_MOST_COLUMNS = 3


@dataclass(frozen=True)
class DraftRates:
    """Of one checkpoint, accepting in one way; entries are per draft, first to last."""

    checkpoint: str
    way: str
    rates: Sequence[float]
    """Share of steps whose drafts up to this one are all accepted; NaN: there were no steps."""
    errors: Sequence[float] = ()
    """Standard errors, where they are known."""


def write_acceptance_plot(
    path: Path, title: str, conditions: str, panels: Mapping[str, Sequence[DraftRates]]
) -> None:
    """Draws ``acceptance_figure`` into ``path``; the same rates make the same bytes.

    Raises RecipeError for another name than FILE.png or FILE.svg, or without matplotlib;
    OutputError if the file cannot be written.
    """
    write_figure(path, lambda: acceptance_figure(title, conditions, panels))


def acceptance_figure(
    title: str, conditions: str, panels: Mapping[str, Sequence[DraftRates]]
) -> Figure:
    """A panel for each text, at least one: rates over drafts, a line for each checkpoint and way.

    A checkpoint has one colour in all panels, a way one kind of dashes.
    """
    from matplotlib.figure import Figure

    every = [line for lines in panels.values() for line in lines]
    checkpoints = list(dict.fromkeys(line.checkpoint for line in every))
    ways = list(dict.fromkeys(line.way for line in every))
    columns = min(_MOST_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (max(6.2, 4.1 * columns), 3.3 * rows + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    figure.supxlabel(shown(conditions), x=0.01, ha="left", fontsize=8)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    _legend(figure, title, checkpoints, ways)
    longest = max(len(line.rates) for line in every)
    for axes, (name, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(shown(name), loc="left", fontsize=10)
        for line in lines:
            style = checkpoint_style(checkpoints.index(line.checkpoint))
            _draw(axes, line, Style(style.colour, style.marker, _dashes(ways, line.way)))
        axes.set_xticks(range(1, longest + 1))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("draft")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("steps with all drafts up to this one\naccepted (%)")
    grid[0].set_ylim(0, 100)
    grid[0].set_xlim(0.8, longest + 0.2)
    return figure


def _draw(axes: Axes, line: DraftRates, style: Style) -> None:
    drafts = np.arange(1, len(line.rates) + 1)
    rates = 100 * np.array(line.rates)
    axes.plot(drafts, rates, **style.line(), markersize=5, clip_on=False, zorder=3)
    if len(line.errors):
        errors = 100 * np.array(line.errors)
        axes.fill_between(
            drafts, rates - errors, rates + errors, color=style.colour, alpha=0.15, linewidth=0
        )


def _dashes(ways: Sequence[str], way: str) -> tuple[float, tuple[float, ...]]:
    return _DASHES[ways.index(way) % len(_DASHES)]


def _legend(figure: Figure, title: str, checkpoints: Sequence[str], ways: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], label=short(name), **checkpoint_style(number).line(), markersize=5)
        for number, name in enumerate(checkpoints)
    ]
    handles += [
        Line2D([], [], label=way, color=INK, linewidth=1, linestyle=_dashes(ways, way))
        for way in ways
    ]
    legend_above(figure, title, handles)
