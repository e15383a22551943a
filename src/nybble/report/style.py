"""What all figures share: one palette, one look, and files that are the same bytes every time."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.core.atomic import write_bytes_atomic
from nybble.core.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.typing import RcKeyType

Dashes = tuple[float, tuple[float, ...]]
"""Offset, then lengths of strokes and gaps in line widths; without any: a solid line."""

SOLID: Dashes = (0, ())
DASHED: Dashes = (0, (4, 1.5))
DOTTED: Dashes = (0, (1, 1.5))

# Okabe and Ito's palette, told apart by the colour-blind; its yellow is too pale for lines.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
INK, FAINT = "#333333", "#B0B0B0"

_SUFFIXES = (".png", ".svg")
_PNG_DOTS_PER_INCH = 160
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LONGEST_NAME = 44
_LETTERS_PER_INCH = 15
"""Of a legend."""
# As many markers as have no factor in common with as many colours: pairs repeat late.
_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    colour: str
    marker: str
    dashes: Dashes = SOLID

    def line(self) -> dict[str, Any]:
        """As matplotlib wants it."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markeredgewidth": 0,
            "linestyle": self.dashes,
            "linewidth": 1,
        }


def checkpoint_style(number: int) -> Style:
    """Of a figure's checkpoints, the one of that number, from 0."""
    return Style(_COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)])


def check_plot_file(path: Path) -> None:
    """Raises RecipeError if a figure cannot be written by that name, or not at all."""
    if path.suffix.lower() not in _SUFFIXES:
        raise RecipeError(f"--plot {path}: give a file that ends in {' or '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise RecipeError(
            f"--plot needs matplotlib: pip install 'nybble[plots]' ({error})"
        ) from error


def write_figure(path: Path, make: Callable[[], Figure]) -> None:
    """Writes what ``make`` draws; it draws with our look, and the same figure is the same bytes.

    Raises RecipeError as ``check_plot_file`` does, OutputError if the file cannot be written.
    """
    check_plot_file(path)
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A folder's name may have letters that the font lacks: it then shows boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()  # not the user's own matplotlibrc: figures are to be alike
        matplotlib.rcParams.update(_look())
        figure = make()
        if path.suffix.lower() == ".svg":
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(file, format="png", dpi=_PNG_DOTS_PER_INCH, metadata={"Software": None})
    write_bytes_atomic(path, file.getvalue())


def names_of(folders: Sequence[str]) -> list[str]:
    """Of checkpoints: their folders' names, or whole paths where names alone are not enough."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def shown(text: str) -> str:
    """``text`` without what cannot be printed."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short(name: str, longest: int = _LONGEST_NAME) -> str:
    """A name that fits: its ends tell more than its middle."""
    name = shown(name)
    if len(name) <= longest:
        return name
    return name[: longest // 2] + "…" + name[len(name) + 1 - (longest - longest // 2) :]


def legend_above(figure: Figure, title: str, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, headed by the figure's title."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = _LETTERS_PER_INCH * figure.get_figwidth()
    figure.legend(
        handles=handles,
        title=shown(title),
        loc="outside upper left",
        alignment="left",
        ncols=int(max(1, min(4, fitting // (longest + 8)))),  # 8: for its line, and a gap
        title_fontproperties={"size": 12, "weight": "bold"},
    )


def without_shared_start(names: Sequence[str]) -> list[str]:
    """Names that begin alike, word for word, without what they share."""
    if len(names) == 1:
        return list(names)
    pairs = zip(min(names), max(names), strict=False)  # what these two share, all do
    shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = max(shared.rfind(mark) for mark in "-_. /") + 1
    return [name[start:] or name for name in names]


def log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade; powers of ten where there are many decades.

    The axis has a log scale and its limits.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    many = math.log10(high / low) > 2.5
    axis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5)))
    text = _power_of_ten if many else "{:g}".format
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def _power_of_ten(value: float) -> str:
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)


def _look() -> dict[RcKeyType, Any]:
    return {
        "svg.hashsalt": "nybble",
        "text.parse_math": False,  # a dollar sign in a name is a dollar sign
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.title_fontsize": 9,
        "legend.borderaxespad": 0.2,
        "legend.columnspacing": 1.2,
        "legend.handlelength": 2.2,
    }
