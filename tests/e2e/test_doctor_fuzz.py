"""2,000 damaged checkpoints: the doctor answers each, soon, in little memory, without a traceback.

The fuzzing runs in a process of its own, which never imports torch: its memory is the doctor's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.broken_checkpoints import Corpus

from nybble.demo import bundled_model

PROGRAM = Path(__file__).parents[1] / "support" / "doctor_fuzzing.py"
GOOD = ("auto_round-shards", "gptq-shards", "compressed-tensors-shards", "base")
EXAMPLES = 500
MEMORY = 200 * 2**20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    with bundled_model() as base:
        return Corpus(base, tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", GOOD)
def test_damaged_files_are_answered(corpus: Corpus, name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), str(corpus.good(name)), str(tmp_path), str(EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["peak_rss_bytes"] < MEMORY
    assert not outcome["has_torch"]
    assert outcome["examples"] >= EXAMPLES
    # Damage that is never noticed would mean that nothing was damaged.
    assert outcome["flagged"] > outcome["examples"] / 4
