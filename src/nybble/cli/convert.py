"""``nybble convert``: one format into another."""

from __future__ import annotations

from pathlib import Path

from nybble.cli.tables import console, human_bytes
from nybble.pipeline.convert import convert


def run(checkpoint: Path, out: Path, format_name: str) -> None:
    """Converts and says what was written."""
    convert(checkpoint, out, format_name)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console.print(f"{out}: {format_name}, {human_bytes(size)}", soft_wrap=True)
