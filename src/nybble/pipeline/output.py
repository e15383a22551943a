"""Whether a run's result is there already."""

from __future__ import annotations

import json
from pathlib import Path

from nybble.checkpoint.index import open_index
from nybble.core.errors import OutputError

MANIFEST = "nybble.json"


def is_finished(out: Path, job: str) -> bool:
    """Whether ``out`` already holds the complete result of this very job.

    Raises OutputError if it holds anything else, CheckpointError if its weights are gone: nothing
    is ever overwritten.
    """
    try:
        if not out.exists():
            return False
        if not out.is_dir():
            raise OutputError(f"{out} is a file: give another output folder")
        if not any(out.iterdir()):
            return False
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot use {out}: {error.strerror}") from error
    try:
        found = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["job"]
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{out} is not empty and holds no result of nybble: give another output folder"
        ) from None
    if found != job:
        raise OutputError(
            f"{out} holds the result of another recipe, base or calibration text: give another "
            "output folder, or remove it"
        )
    open_index(out)  # raises if its weights are gone
    return True
