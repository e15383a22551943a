"""How far long work is: a live bar on a terminal, else plain lines, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None] | None]:
    """(share done, what is running) -> shown; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)


@contextmanager
def pass_display() -> Iterator[Callable[[str, int, int], None]]:
    """(what is running, blocks done, of how many) -> shown; a line per pass without a terminal."""
    with progress_bar() as show:

        def on_pass(name: str, done: int, total: int) -> None:
            if show is not None:
                show(done / total, f"{name}, block {done}/{total}")
            elif done == total:
                sys.stderr.write(f"{name}: {total} blocks done\n")

        yield on_pass
