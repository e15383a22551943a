"""Tables and figures as text, for every command: no import here is slow."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, markup=False)


def human_bytes(count: float) -> str:
    """12_345_678 -> '12.3 MB' (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def human_seconds(seconds: float) -> str:
    """3725 -> '1 h 02 min'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def table(text_columns: list[str], number_columns: list[str]) -> Table:
    """An empty table: text is folded where the terminal is narrow, numbers never are."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in text_columns:
        made.add_column(column, overflow="fold")
    for column in number_columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made
