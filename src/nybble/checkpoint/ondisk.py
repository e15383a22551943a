"""First contact with files that others wrote: sizes, JSON, and how to quote their contents."""

from __future__ import annotations

import json
import reprlib
import stat
from pathlib import Path
from typing import Any

from nybble.core.errors import CheckpointError

_QUOTE = reprlib.Repr()
_QUOTE.maxstring = 120
_QUOTE.maxother = 120


def shown(value: object) -> str:
    """``value`` for an error message: one line and short, whatever it holds."""
    return _QUOTE.repr(value)


def is_unicode(name: str) -> bool:
    """False for a lone surrogate: JSON can spell it, but no file can hold it as text."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def regular_size(path: Path) -> int:
    """The size in bytes of a regular file; links are followed.

    Anything else (a pipe would block forever when opened) raises CheckpointError.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"cannot read {path}: not a regular file")
    return status.st_size


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError if it is missing or anything else."""
    regular_size(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``, UTF-8, no key twice at any level.

    ``where`` starts the message of the CheckpointError for anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {shown(value)}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json.loads keeps the last of two equal keys silently; other readers keep the first.
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the name {shown(key)} appears twice")
            seen.add(key)
    return result
