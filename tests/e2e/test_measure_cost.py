"""Measuring takes the memory of a block, and little more time than the models themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import environment
from support.large_checkpoints import large_config, write_large_base, write_large_int4

LIMIT = 1_200_000_000
PROGRAM = Path(__file__).with_name("measure_cost.py")


def gated_delta(blocks: int, heads: int, **values: Any) -> dict[str, Any]:
    """config.json of a model with heads of 128 dimensions."""
    return large_config(
        num_hidden_layers=blocks,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * (blocks // 4),
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=heads // 2,
        linear_num_value_heads=heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        **values,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied in the end: pytest would keep gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def found_by(what: str, base: Path, candidate: Path, windows: int, seqlen: int) -> dict[str, Any]:
    """What measure_cost.py prints, in a process of its own with one thread."""
    words = [sys.executable, PROGRAM, what, base, candidate, windows, seqlen]
    # Through a shell that forks: Linux counts the peak of the process that calls exec as the new
    # program's own, and pytest's may be large by now.
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@"; exit $?', "sh", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_three_gigabytes_are_scored_in_little_more_than_one(folder: Path) -> None:
    config = gated_delta(24, 16, vocab_size=96_000, hidden_size=2048, intermediate_size=5632)
    base, candidate = folder / "base", folder / "int4"
    assert write_large_base(base, config) > 3_000_000_000
    write_large_int4(candidate, base, config)
    found = found_by("memory", base, candidate, windows=2, seqlen=32)
    assert found["positions"] == 62
    assert found["kld"] > 0.1
    assert found["peak_rss_bytes"] < LIMIT


def test_scoring_takes_little_more_than_two_forward_passes(folder: Path) -> None:
    """Against both models in memory as a whole, nothing to read or to de-quantize.

    In time of the processor, which others on the machine do not change. The output head is a
    eighth of this model, in a large one a twentieth.
    """
    config = gated_delta(8, 4, vocab_size=8192, hidden_size=512, intermediate_size=1536)
    base, candidate = folder / "base", folder / "int4"
    write_large_base(base, config)
    write_large_int4(candidate, base, config)
    found = found_by("time", base, candidate, windows=8, seqlen=256)
    assert found["compare_seconds"] < 1.25 * found["forward_seconds"]
