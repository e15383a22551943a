"""Runs the command line as a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, without what earlier tests or pytest put there."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "COLUMNS")
    }
    return {**kept, "OMP_NUM_THREADS": "1", **(extra or {})}


def run_nybble(
    *arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 120
) -> Outcome:
    """``python -m nybble`` with these arguments."""
    return run_python(["-m", "nybble", *map(str, arguments)], env, timeout)


def run_python(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120
) -> Outcome:
    """This interpreter with these arguments."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def refusal(outcome: Outcome) -> str:
    """The one line in which bad input is refused."""
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.err.endswith("\n")
    line = outcome.err.removesuffix("\n")
    assert "\n" not in line, outcome.err
    assert line.startswith("nybble: ")
    return line.removeprefix("nybble: ")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything under a folder: time of change, and bytes of files."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }
