"""Evaluation windows, and the guard against text that a candidate was calibrated on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nybble.checkpoint.ondisk import read_object
from nybble.core.errors import CheckpointError, DataError
from nybble.data.rows import Rows, build_rows, refuse_overlap
from nybble.recipe.schema import Calibration

_MANIFEST = "nybble.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class Text:
    """Windows that follow one another in a text, without overlap."""

    source: str = "wikitext-2-raw-test"
    windows: int = 64
    seqlen: int = 2048

    def __str__(self) -> str:
        return f"{self.windows} windows of {self.seqlen} tokens of {self.source}"


def open_tokenizer(folder: Path) -> Any:
    """A checkpoint's own tokenizer. Raises CheckpointError if it has none that can be read."""
    # Without any, transformers makes an empty one of config.json's model_type.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: there is none")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {reason}") from error


def tokenizer_sha256(folder: Path) -> str:
    """One hash, in hex, of the files that decide how text becomes tokens."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()


def windows_of(text: Text, tokenizer: Any) -> Rows:
    """The text's windows, documents joined end to end.

    Raises DataError if the source is not usable, or too short.
    """
    rows = Calibration(
        source=text.source, rows=text.windows, seqlen=text.seqlen, layout="pack", seed=0
    )
    return build_rows(rows, tokenizer)


def refuse_calibration_text(candidate: Path, rows: Rows) -> None:
    """Raises DataError if the manifest of a candidate says that it was calibrated on a window."""
    if not (candidate / _MANIFEST).is_file():
        return
    calibration = read_object(candidate / _MANIFEST).get("calibration")
    hashes = calibration.get("row_sha256") if isinstance(calibration, dict) else None
    if isinstance(hashes, list):
        try:
            refuse_overlap(rows, [one for one in hashes if isinstance(one, str)])
        except DataError as error:
            raise DataError(f"{candidate}: {error}, or allow it by --allow-overlap") from error
