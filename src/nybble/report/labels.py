"""Names beside the points of a panel, none over another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nybble.report.style import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Which way the name lies, nearest first: to the right, to the left, above, below, the corners.
_WAYS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_HORIZONTAL = {1: "left", 0: "center", -1: "right"}
_VERTICAL = {1: "bottom", 0: "center", -1: "top"}
_DISTANCES = (7, 14, 22, 32, 44, 58)
"""From the point, in points. From the second on, a line leads there."""
_REACH = 5
"""Of a marker around its point, in pixels."""
_FONT_SIZE = 8


@dataclass(frozen=True)
class NamedPoint:
    """A point of a panel, in its data's units."""

    name: str
    x: float
    y: float
    low: float
    high: float
    """The ends of its error bar."""


def label_points(
    axes: Axes, points: Sequence[NamedPoint], lines: Sequence[float] = ()
) -> list[Annotation]:
    """Names each point where there is room: inside the panel, off points, names and ``lines``.

    ``lines`` are the heights of horizontal lines. The axes have their limits and the figure its
    size. A name that finds no room is left out: the legend has it.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # gives the panel its place
    pixels = axes.transData.transform
    room = axes.get_window_extent()
    taken = [
        Bbox([pixels((point.x, point.low)) - _REACH, pixels((point.x, point.high)) + _REACH])
        for point in points
    ]
    for line in lines:
        height = pixels((points[0].x, line))[1]
        taken.append(Bbox([(room.x0, height - 1), (room.x1, height + 1)]))
    labels = []
    for point in points:
        sample = figure.text(0, 0, point.name, fontsize=_FONT_SIZE)
        size = np.array(sample.get_window_extent().size)
        sample.remove()
        for distance, way, box in _places(pixels((point.x, point.y)), size, figure.dpi / 72):
            if _contains(room, box) and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                labels.append(_write(axes, point, distance, way))
                break
    return labels


Way = tuple[int, int]


def _places(
    at: NDArray[np.float64], size: NDArray[np.float64], scale: float
) -> Iterator[tuple[int, Way, Bbox]]:
    """(distance, way, pixels that the name covers there), the best first."""
    from matplotlib.transforms import Bbox

    for distance in _DISTANCES:
        for way in _WAYS:
            corner = at + distance * scale * np.array(way) + size * (np.array(way) - 1) / 2
            yield distance, way, Bbox([corner, corner + size])


def _write(axes: Axes, point: NamedPoint, distance: int, way: Way) -> Annotation:
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    label = axes.annotate(
        point.name,
        (point.x, point.y),
        (distance * way[0], distance * way[1]),
        textcoords="offset points",
        ha=_HORIZONTAL[way[0]],
        va=_VERTICAL[way[1]],
        fontsize=_FONT_SIZE,
        arrowprops=leader if distance > _DISTANCES[0] else None,
    )
    label.set_in_layout(False)  # it stands where there is room, and asks for none
    return label


def _contains(room: Bbox, box: Bbox) -> bool:
    return bool(room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1)
