"""Every kind of broken checkpoint there is, and a place where each is made once.

The kinds are functions in three modules, by what they break. None of them uses the code that the
doctor or ``nybble repair`` consists of.
"""

from __future__ import annotations

from pathlib import Path

from . import broken_files, broken_rules, broken_tensors
from .breaking import KINDS, Kind, linked_copy
from .good_checkpoints import GOOD, write_good

__all__ = ["CASES", "KINDS", "Corpus", "Kind"]

CASES: dict[str, tuple[Kind, str]] = {
    f"{kind.name}-{start}": (kind, start) for kind in KINDS.values() for start in kind.starts
}
"""Kind of damage and sound checkpoint, by a name for both."""

assert {broken_files, broken_rules, broken_tensors}  # imported for what they enter in KINDS


class Corpus:
    """Sound and broken checkpoints in one folder, each made when it is first asked for."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base = base
        self._folder = folder

    def good(self, name: str) -> Path:
        """The sound checkpoint of this name."""
        assert name in GOOD
        path = self._folder / "good" / name
        return path if path.exists() else write_good(self._base, path, name)

    def broken(self, case: str) -> Path:
        """The broken checkpoint of a name in CASES."""
        kind, start = CASES[case]
        path = self._folder / "broken" / case
        if not path.exists():
            kind.apply(linked_copy(self.good(start), path))
        return path
