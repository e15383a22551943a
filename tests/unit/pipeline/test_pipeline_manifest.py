from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import Tiny, write_tiny
from support.commands import run_python

from nybble.checkpoint.reader import CheckpointReader
from nybble.data.rows import Rows, rows_of
from nybble.pipeline.manifest import job_fingerprint, peak_rss_bytes
from nybble.recipe.schema import Recipe, Scheme

ROWS = rows_of([[1, 2, 3]], 3)
OTHER_ROWS = rows_of([[1, 2, 4]], 3)


def job_of(folder: Path, recipe: Recipe | None = None, rows: Rows | None = ROWS) -> str:
    with CheckpointReader(folder) as base:
        return job_fingerprint(recipe or Recipe(), base, rows)


def test_a_job_is_named_by_all_that_decides_its_bytes(tiny_base: Path, tmp_path: Path) -> None:
    configured = write_tiny(tmp_path / "configured")
    config = json.loads((configured / "config.json").read_text())
    (configured / "config.json").write_text(json.dumps({**config, "x": 1}))
    jobs = [
        job_of(tiny_base),
        job_of(tiny_base, Recipe(scheme=Scheme(bits=8))),
        job_of(write_tiny(tmp_path / "text", Tiny(wrapper=False))),
        job_of(configured),
        job_of(tiny_base, rows=OTHER_ROWS),
        job_of(tiny_base, rows=None),
    ]
    assert len(set(jobs)) == len(jobs)


def test_a_job_does_not_depend_on_where_the_base_lies(tiny_base: Path, tmp_path: Path) -> None:
    assert job_of(tiny_base) == job_of(write_tiny(tmp_path / "elsewhere"))


def test_the_peak_covers_what_this_process_used() -> None:
    held = torch.ones(50_000_000)
    assert peak_rss_bytes() > held.nbytes


PARENT = """
import subprocess, sys
held = bytearray(1_500_000_000)
held[::4096] = b"x" * len(held[::4096])
child = "from nybble.pipeline.manifest import peak_rss_bytes; print(peak_rss_bytes())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a rule of Linux")
def test_the_peak_of_the_calling_process_is_not_counted() -> None:
    """Linux hands the peak on over fork and exec; who starts nybble must not matter."""
    assert 50_000_000 < int(run_python(["-c", PARENT]).out) < 1_200_000_000
