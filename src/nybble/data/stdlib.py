"""Text that every machine with Python has: the standard library's sources.

The bundled tiny model is trained on the ``train`` split and everything is measured on the
``heldout`` split. A file's split depends on its relative path alone, so no version of a
held-out file was ever trained on, whatever Python version reads it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

# Not every installation has these (tests, GUI, bundled pip), or they are tables, not text.
_SKIPPED_PARTS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "tkinter",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "lib-dynload",
        "__pycache__",
    }
)


def split_of(name: str) -> Split:
    """``heldout`` for one name in ten, decided by its hash."""
    return "heldout" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(split: Split, root: Path | None = None) -> list[Path]:
    """The library's .py files of one split, in path order."""
    root = root or stdlib_root()
    return [path for path in _all_sources(root) if split_of(_name(path, root)) == split]


def documents(split: Split, root: Path | None = None) -> Iterator[str]:
    """The text of each file of one split, in path order."""
    for path in source_files(split, root):
        yield path.read_text(encoding="utf-8", errors="replace")


def _all_sources(root: Path) -> list[Path]:
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_PARTS.intersection(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    )


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
