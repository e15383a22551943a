"""``nybble log``: how the modules of a quantized checkpoint fared, as tables and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nybble.cli.tables import console, human_seconds, table
from nybble.report.plot import write_plot
from nybble.report.quant_log import ModuleLog, log_file, read_quant_log
from nybble.report.style import check_plot_file
from nybble.report.summary import (
    block_seconds,
    error_measure,
    headline,
    summarize,
    worst_modules,
)

WORST = 10
_UNKNOWN = "-"


def run(checkpoint: Path, plot: Path | None) -> None:
    """Prints the tables; with ``plot``, also draws the figure into that file."""
    if plot is not None:
        check_plot_file(plot)
    path = log_file(checkpoint)
    rows = read_quant_log(path)
    # As it is named on disk, also where "." was given.
    name = path.resolve().parent.name
    if plot is not None:
        write_plot(plot, f"{name}: {headline(rows)}", rows)
    blocks = len({row.block for row in rows})
    console.print(
        f"{name}: {headline(rows)}, {_counted(len(rows), 'module')} in "
        f"{_counted(blocks, 'block')}, {human_seconds(block_seconds(rows))}\n",
        soft_wrap=True,
    )
    _print_quality(rows)
    _print_calibration(rows)
    _print_worst(rows)
    if plot is not None:
        console.print(f"\nThe figure is in {plot}", soft_wrap=True)


def _print_quality(rows: Sequence[ModuleLog]) -> None:
    """A line per part. Errors only where the algorithm measured them."""
    parts = summarize(rows)
    error_columns = {
        "error": [_error(part.median_error) for part in parts],
        "worst": [_error(part.worst_error) for part in parts],
        "of RTN's": [_ratio(part.error_ratio) for part in parts],
    }
    shown = _measured(error_columns)
    made = table(["part"], ["modules", "bits", *shown, "SQNR dB", "worst"])
    for number, part in enumerate(parts):
        made.add_row(
            part.section,
            str(part.modules),
            "+".join(map(str, part.bits)),
            *(cells[number] for cells in shown.values()),
            f"{part.median_sqnr_db:.1f}",
            f"{part.worst_sqnr_db:.1f}",
        )
    console.print(made)
    if "error" in shown:
        console.print(
            f"error: squared output error over squared output, {error_measure(rows)}",
            soft_wrap=True,
        )


def _print_calibration(rows: Sequence[ModuleLog]) -> None:
    """What calibration met; nothing where the algorithm recorded none of it."""
    parts = summarize(rows)
    shown = _measured(
        {
            "too few tokens": [_count(part.too_few_tokens) for part in parts],
            "damping increases": [_count(part.damping_increases) for part in parts],
            "dead channels": [_count(part.dead_channels) for part in parts],
            "time": [
                _UNKNOWN if part.seconds is None else human_seconds(part.seconds) for part in parts
            ],
        }
    )
    if not shown:
        return
    made = table(["part"], list(shown))
    for number, part in enumerate(parts):
        made.add_row(part.section, *(cells[number] for cells in shown.values()))
    console.print()
    console.print(made)


def _print_worst(rows: Sequence[ModuleLog]) -> None:
    worst = worst_modules(rows, WORST)
    shown = _measured(
        {
            "error": [_error(row.output_error) for row in worst],
            "of RTN's": [_ratio(row.error_ratio) for row in worst],
            "SQNR dB": [f"{row.sqnr_db:.1f}" for row in worst],
            # Every other module sees them all.
            "tokens": [_count(row.tokens if row.is_expert else None) for row in worst],
        }
    )
    what = "largest output error" if "error" in shown else "lowest SQNR"
    made = table([f"{len(worst)} with the {what}"], list(shown))
    for number, row in enumerate(worst):
        made.add_row(row.module, *(cells[number] for cells in shown.values()))
    console.print()
    console.print(made)


def _measured(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without the columns that have no value anywhere."""
    return {
        name: cells for name, cells in columns.items() if any(cell != _UNKNOWN for cell in cells)
    }


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _error(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.0%}"


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"
