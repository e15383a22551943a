"""A log as one figure: output error and signal to noise ratio of every module, by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from nybble.core.errors import CheckpointError
from nybble.report.kinds import kind_of, styles
from nybble.report.quant_log import ModuleLog
from nybble.report.style import DOTTED, FAINT, INK, log_ticks, shown, write_figure
from nybble.report.summary import error_measure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond them, axes overflow; sound logs only leave them with an error of 0 or an infinite ratio.
_LARGEST, _LOUDEST = 1e30, 1e6
_MIXERS = ("gdn", "attention")

Measure = str
"""Name of a ModuleLog column that is plotted: output_error, rtn_output_error or sqnr_db."""


@dataclass(frozen=True)
class Point:
    """All modules of one kind in one block: one Linear, or those of many experts."""

    block: int
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class _Places:
    """Where blocks stand on the x axis: the trunk's at their number, the rest beside them."""

    trunk: tuple[int, ...]
    extra: Mapping[int, str]
    """Label of each block that is not of the trunk."""

    def x(self, block: int) -> float:
        if block not in self.extra:
            return block
        return self.last + self.gap * (1 + list(self.extra).index(block))

    @property
    def last(self) -> int:
        return max(self.trunk, default=0)

    @property
    def gap(self) -> float:
        """Wide enough for the labels below."""
        return max(1.0, 0.08 * self.last)


def write_plot(path: Path, title: str, rows: Sequence[ModuleLog]) -> None:
    """Draws ``rows`` into ``path``; the same rows make the same bytes.

    Panels: relative output error (log scale; with that of rounding to nearest, faint, where it is
    known) above SQNR; token mixing to the left of everything else. Of experts, the median and the
    range. Values that have no place on an axis (an error of 0, an infinite ratio) are left out.

    Raises CheckpointError if nothing is left to draw, RecipeError and OutputError as
    ``write_figure`` does.
    """
    panels = [name for name in ("output_error", "sqnr_db") if any(_drawable(r, name) for r in rows)]
    if not panels:
        raise CheckpointError("nothing to plot: all weights are held exactly")
    write_figure(path, lambda: _figure(shown(title), rows, panels))


def points(rows: Sequence[ModuleLog], measure: Measure) -> list[Point]:
    """What is known of ``measure``, one point per block, by block."""
    by_block: dict[int, list[float]] = {}
    for row in rows:
        if _drawable(row, measure):
            by_block.setdefault(row.block, []).append(getattr(row, measure))
    return [
        Point(block, median(values), min(values), max(values))
        for block, values in sorted(by_block.items())
    ]


def _drawable(row: ModuleLog, measure: Measure) -> bool:
    value = getattr(row, measure)
    low, high = (-_LOUDEST, _LOUDEST) if measure == "sqnr_db" else (1 / _LARGEST, _LARGEST)
    return value is not None and low <= value <= high


def _figure(title: str, rows: Sequence[ModuleLog], panels: Sequence[Measure]) -> Figure:
    from matplotlib.figure import Figure

    mixers = [row for row in rows if row.part in _MIXERS]
    others = [row for row in rows if row.part not in _MIXERS]
    columns = [part for part in (mixers, others) if part]
    places = _places(rows)
    size = (6.2 * len(columns), 3.4 * len(panels) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    grid = figure.subplots(len(panels), len(columns), sharex=True, sharey="row", squeeze=False)
    for column, part in enumerate(columns):
        for axes, measure in zip(grid[:, column], panels, strict=True):
            _draw(axes, part, measure, places)
        _legend(grid[0, column], part)
        _block_axis(grid[-1, column], places)
    for axes, measure in zip(grid[:, 0], panels, strict=True):
        if measure == "output_error":
            axes.set_yscale("log")
            log_ticks(axes.yaxis)
            axes.set_ylabel(f"relative output error\n({error_measure(rows)})")
        else:
            axes.set_ylabel("SQNR of the weight (dB)")
    return figure


def _places(rows: Sequence[ModuleLog]) -> _Places:
    extra = {
        row.block: "MTP" if row.part == "mtp" else "head"
        for row in sorted(rows, key=lambda row: row.block)
        if row.part in ("mtp", "lm_head")
    }
    return _Places(tuple(sorted({row.block for row in rows}.difference(extra))), extra)


def _draw(axes: Axes, rows: Sequence[ModuleLog], measure: Measure, places: _Places) -> None:
    """A line for every kind along the trunk, a lone marker for the same kind elsewhere."""
    size = 4.5 if len(places.trunk) <= 32 else 3.0
    if places.trunk and places.extra:
        axes.axvline(places.last + places.gap / 2, color=FAINT, linewidth=0.6, zorder=0)
    by_kind = _by_kind(rows)
    for kind, style in styles(by_kind).items():
        if measure == "output_error":
            for stretch in _stretches(points(by_kind[kind], "rtn_output_error"), places):
                axes.plot(
                    *_line(stretch, places), color=style.colour, alpha=0.45, linewidth=0.9,
                    linestyle=DOTTED, marker="_" if len(stretch) == 1 else "", zorder=2,
                )  # fmt: skip
        for stretch in _stretches(points(by_kind[kind], measure), places):
            axes.plot(*_line(stretch, places), **style.line(), markersize=size, zorder=3)
            _draw_range(axes, stretch, places, style.colour)


def _draw_range(axes: Axes, stretch: Sequence[Point], places: _Places, colour: str) -> None:
    if all(point.low == point.high for point in stretch):
        return
    xs, _ = _line(stretch, places)
    lows, highs = [p.low for p in stretch], [p.high for p in stretch]
    if len(stretch) == 1:
        axes.vlines(xs, lows, highs, color=colour, alpha=0.4, linewidth=3, zorder=1)
    else:
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.12, linewidth=0, zorder=1)


def _stretches(found: Sequence[Point], places: _Places) -> list[list[Point]]:
    """The trunk's points, then each other one alone: they are not neighbours."""
    trunk = [point for point in found if point.block not in places.extra]
    rest = [[point] for point in found if point.block in places.extra]
    return ([trunk] if trunk else []) + rest


def _line(stretch: Sequence[Point], places: _Places) -> tuple[list[float], list[float]]:
    return [places.x(point.block) for point in stretch], [point.middle for point in stretch]


def _by_kind(rows: Sequence[ModuleLog]) -> dict[str, list[ModuleLog]]:
    found: dict[str, list[ModuleLog]] = {}
    for row in rows:
        found.setdefault(kind_of(row.module), []).append(row)
    return found


def _legend(axes: Axes, rows: Sequence[ModuleLog]) -> None:
    """Above the panel, headed by the parts it holds."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = styles(_by_kind(rows))
    handles: list[Artist] = [
        Line2D([], [], label=kind, **style.line()) for kind, style in kinds.items()
    ]
    if any(_drawable(row, "rtn_output_error") for row in rows):
        label = "rounded to nearest"
        handles.append(Line2D([], [], color=INK, alpha=0.6, linestyle=DOTTED, label=label))
    if any(row.is_expert for row in rows):
        handles.append(Patch(color=INK, alpha=0.15, linewidth=0, label="range over experts"))
    axes.legend(
        handles=handles,
        title=", ".join(dict.fromkeys(row.part for row in rows)),
        loc="lower left",
        alignment="left",
        bbox_to_anchor=(0, 1.0),
        ncols=4 if max(map(len, kinds)) <= 12 else 3,
    )


def _block_axis(axes: Axes, places: _Places) -> None:
    """Block numbers, and after them what is not one of the trunk's blocks."""
    from matplotlib.ticker import MaxNLocator

    ticks: list[float] = []
    if places.trunk:
        located = MaxNLocator(nbins=10, integer=True).tick_values(places.trunk[0], places.last)
        ticks = [t for t in located if places.trunk[0] <= t <= places.last]
    labels = [f"{tick:.0f}" for tick in ticks] + list(places.extra.values())
    axes.set_xticks(ticks + [places.x(block) for block in places.extra], labels)
    axes.set_xlabel("block")
