"""Divergences from a base as one figure: how they are distributed, where they arise, what they
cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nybble.report.kld_curves import (
    LARGEST,
    SMALLEST,
    Array,
    Divergence,
    Floor,
    by_depth,
    drawable,
    front,
    histogram_bins,
    quantiles,
    shares,
    wide,
)
from nybble.report.labels import NamedPoint, label_points
from nybble.report.style import (
    DASHED,
    DOTTED,
    FAINT,
    INK,
    Style,
    checkpoint_style,
    legend_above,
    log_ticks,
    short,
    shown,
    without_shared_start,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Marked on the curves: those that tables give."""
_TICKED = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
_CURVE_POINTS = 200
_MEANING = "The legend has each mean over positions, +- its standard error by window."
_NEAR = 100
"""A floor lower than the lowest value by more than this factor does not stretch an axis."""


@dataclass(frozen=True)
class Heading:
    """What is written around the panels."""

    title: str
    conditions: str
    """Below them."""
    measure: str = "KL divergence (nats)"


def write_kld_plot(
    path: Path, heading: Heading, found: Sequence[Divergence], floors: Sequence[Floor]
) -> None:
    """Draws ``kld_figure`` into ``path``; the same divergences make the same bytes.

    Raises RecipeError for another name than FILE.png or FILE.svg, or without matplotlib;
    OutputError if the file cannot be written.
    """
    write_figure(path, lambda: kld_figure(heading, found, floors))


def kld_figure(heading: Heading, found: Sequence[Divergence], floors: Sequence[Floor]) -> Figure:
    """Histogram, quantiles, mean by depth in the window, and mean against size.

    All scales of divergence are logarithmic; what has no place there, a mean of zero or not a
    number, is told in the legend alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.4, 9.6), layout="constrained")
    figure.supxlabel(shown(f"{heading.conditions}. {_MEANING}"), x=0.01, ha="left", fontsize=8)
    grid = figure.subplots(2, 2)
    _legend(figure, heading, found, floors)
    _histogram(grid[0, 0], found, heading.measure)
    _quantile_curves(grid[0, 1], found, floors, heading.measure)
    _by_depth(grid[1, 0], found, floors, f"mean {heading.measure}")
    _against_size(grid[1, 1], found, floors, f"mean {heading.measure}")
    return figure


def _histogram(axes: Axes, found: Sequence[Divergence], measure: str) -> None:
    bins = histogram_bins(found)
    axes.set_title("Distribution over positions", loc="left", fontsize=10)
    axes.set_xlabel(f"{measure}; the first bin holds all below it")
    axes.set_ylabel("share of positions (%)")
    if bins is None:
        _say_nothing_to_draw(axes)
        return
    axes.set_xscale("log")
    axes.set_xlim(bins[0], bins[-1])
    log_ticks(axes.xaxis)
    for style, one in _styled(found):
        if not (drawable(one.known) > 0).any():
            continue
        axes.stairs(shares(one, bins), bins, color=style.colour, linewidth=1.1)
        axes.stairs(shares(one, bins), bins, color=style.colour, alpha=0.07, fill=True, zorder=0)
    axes.set_ylim(bottom=0)


def _quantile_curves(
    axes: Axes, found: Sequence[Divergence], floors: Sequence[Floor], measure: str
) -> None:
    """Each further nine is as wide as the one before it."""
    axes.set_title("Quantiles", loc="left", fontsize=10)
    axes.set_xlabel("share of positions with less")
    axes.set_ylabel(measure)
    largest = max(one.kld.size for one in found)
    end = max(math.log10(largest), 1.0)
    at = 1 - np.logspace(0, -end, _CURVE_POINTS)
    marked = np.array([share for share in _QUANTILES if _nines(share) <= end])
    curves = [(quantiles(one, at), quantiles(one, marked)) for one in found]
    floor_values = [value for floor in floors for value in (floor.median, floor.p99)]
    seen = [value for curve, _ in curves for value in (*curve[at >= 0.1], curve[-1])]
    if not _scale_log(axes, seen, floor_values):
        _say_nothing_to_draw(axes)
        return
    for (style, _), (curve, dots) in zip(_styled(found), curves, strict=True):
        axes.plot(_nines(at), drawable(curve), color=style.colour, linewidth=1.2)
        axes.plot(
            _nines(marked), drawable(dots), **(style.line() | {"linestyle": ""}), markersize=5
        )
    for number, floor in enumerate(floors):
        ends = drawable(np.array([floor.median, floor.p99]))
        axes.plot(_nines(np.array([0.5, 0.99])), ends, **_floor_line(number), marker="|")
    ticks = [share for share in _TICKED if _nines(share) <= end]
    axes.set_xticks([float(_nines(share)) for share in ticks], [f"{100 * t:g} %" for t in ticks])
    axes.set_xlim(0, end)


def _by_depth(
    axes: Axes, found: Sequence[Divergence], floors: Sequence[Floor], measure: str
) -> None:
    axes.set_title("By depth in the window, +- standard error", loc="left", fontsize=10)
    axes.set_xlabel("tokens that the models were given")
    axes.set_ylabel(measure)
    depths = [by_depth(one) for one in found]
    if not _scale_log(axes, [m for d in depths for m in d.means], [f.mean for f in floors]):
        _say_nothing_to_draw(axes)
        return
    bottom, _ = axes.get_ylim()
    for (style, _), depth in zip(_styled(found), depths, strict=True):
        means = drawable(depth.means)
        axes.plot(depth.tokens, means, **style.line(), markersize=4)
        low, high = means - depth.errors, means + depth.errors
        axes.fill_between(
            depth.tokens, np.maximum(low, bottom), high, color=style.colour, alpha=0.15, linewidth=0
        )
    _floor_lines(axes, floors)
    longest = max(float(depth.tokens[-1]) for depth in depths)
    axes.set_xscale("log", base=2)
    powers = range(0, max(1, math.ceil(math.log2(longest))) + 1)
    axes.set_xticks([2**p for p in powers], [str(2**p) for p in powers])
    axes.set_xlim(0.9, max(2, longest) * 1.1)


def _against_size(
    axes: Axes, found: Sequence[Divergence], floors: Sequence[Floor], measure: str
) -> None:
    """Those that no other one beats in both are joined."""
    unit, factor = _size_unit(found)
    axes.set_title("Against size, +- standard error", loc="left", fontsize=10)
    axes.set_xlabel(f"size of the weights ({unit})")
    axes.set_ylabel(measure)
    means = [one.mean for one in found]
    if not _scale_log(axes, [mean for mean, _ in means], [f.mean for f in floors]):
        _say_nothing_to_draw(axes)
        return
    bottom, _ = axes.get_ylim()
    names = without_shared_start([one.name for one in found])
    points = []
    for name, (style, one), (mean, error) in zip(names, _styled(found), means, strict=True):
        if not SMALLEST <= mean <= LARGEST:
            continue
        spread = 0.0 if math.isnan(error) else error
        size = one.weight_bytes / factor
        low, high = max(mean - spread, bottom), mean + spread
        axes.vlines(size, low, high, color=style.colour, linewidth=1.2)
        axes.plot([size], [mean], **(style.line() | {"linestyle": ""}), markersize=7)
        points.append(NamedPoint(short(name, 32), size, mean, low, high))
    best = front([(point.x, point.y) for point in points])
    axes.plot(*zip(*best, strict=True), color=FAINT, linewidth=0.8, zorder=1)
    _floor_lines(axes, floors)
    sizes = [point.x for point in points]
    margin = max(0.18 * (max(sizes) - min(sizes)), 0.05 * max(sizes), 1e-9)
    axes.set_xlim(min(sizes) - margin, max(sizes) + margin)
    label_points(axes, points, [floor.mean for floor in floors if floor.mean > bottom])


def _legend(
    figure: Figure, heading: Heading, found: Sequence[Divergence], floors: Sequence[Floor]
) -> None:
    """Each name with its mean."""
    from matplotlib.lines import Line2D

    means = [one.mean for one in found]
    lowest = min((mean for mean, _ in means if mean >= SMALLEST), default=math.inf)
    handles = []
    for (style, one), (mean, error) in zip(_styled(found), means, strict=True):
        label = f"{short(one.name)}: {_figure_of(mean)}"
        if not math.isnan(error):
            label += f" +- {error:.2g}"
        if any(mean < 2 * floor.mean for floor in floors):
            label += ", below 2x floor"
        handles.append(Line2D([], [], label=label, **style.line(), markersize=5))
    for number, floor in enumerate(floors):
        label = f"floor, base {floor.how}: {_figure_of(floor.mean)}"
        if floor.mean < lowest / _NEAR:
            label += ", too low to draw"
        handles.append(Line2D([], [], label=label, **_floor_line(number)))
    legend_above(figure, heading.title, handles)


def _figure_of(mean: float) -> str:
    return "not a number" if math.isnan(mean) else f"{mean:.4g}"


def _styled(found: Sequence[Divergence]) -> list[tuple[Style, Divergence]]:
    return [(checkpoint_style(number), one) for number, one in enumerate(found)]


def _floor_line(number: int) -> dict[str, Any]:
    return {
        "color": INK,
        "alpha": 0.7,
        "linewidth": 0.9,
        "linestyle": (DASHED, DOTTED)[number % 2],
        "zorder": 1,
    }


def _floor_lines(axes: Axes, floors: Sequence[Floor]) -> None:
    bottom, _ = axes.get_ylim()
    for number, floor in enumerate(floors):
        if floor.mean > bottom:
            axes.axhline(floor.mean, **_floor_line(number))


def _scale_log(axes: Axes, values: Sequence[float], floors: Sequence[float]) -> bool:
    """Fits the y axis to the values, and to floors that are near; False if no value is above 0."""
    seen = [value for value in values if SMALLEST <= value <= LARGEST]
    if not seen:
        return False
    near = [floor for floor in floors if min(seen) / _NEAR <= floor <= LARGEST]
    low, high = wide(min([*seen, *near]) / 1.25, max([*seen, *near]) * 1.25)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis)
    return True


def _nines(share: float | Array) -> Array:
    return np.asarray(-np.log10(1 - np.asarray(share)))


def _size_unit(found: Sequence[Divergence]) -> tuple[str, float]:
    largest = max(one.weight_bytes for one in found)
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def _say_nothing_to_draw(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing above zero", transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
