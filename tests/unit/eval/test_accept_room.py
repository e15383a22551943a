from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import read_weights

from nybble.core.errors import CheckpointError
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights
from nybble.eval import room
from nybble.eval.room import available_bytes, refuse_too_large

CPU = torch.device("cpu")
TOKENS = 100


@pytest.fixture
def needed(tiny_base: Path) -> int:
    """Bytes of the model in float32, and of two copies of the logits."""
    tensors = read_weights(tiny_base)
    parameters = sum(t.numel() for name, t in tensors.items() if "visual" not in name)
    return 4 * parameters + 2 * 4 * TOKENS * len(tensors["lm_head.weight"])


def check(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda _: free)
    with ModelWeights(folder) as weights:
        refuse_too_large(weights, Arithmetic(CPU), TOKENS)


def test_a_model_that_just_fits(
    tiny_base: Path, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(tiny_base, monkeypatch, needed)
    with pytest.raises(CheckpointError, match="does not fit"):
        check(tiny_base, monkeypatch, needed - 1)


def test_the_refusal_shows_the_arithmetic(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError) as caught:
        check(tiny_base, monkeypatch, 3_000_000)
    line = str(caught.value)
    assert "\n" not in line
    assert " parameters x 4 bytes = 0.00 GB" in line
    assert "cpu has 0.00 GB free" in line
    assert "leave out --on-policy" in line


@pytest.mark.parametrize(("limit", "expected"), [("max", 3072), ("2048", 2048), ("9999", 3072)])
def test_a_container_may_have_less_than_the_machine(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:       3 kB\nBuffers: 1 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_CGROUP_LIMIT", tmp_path / "memory.max")
    assert available_bytes(CPU) == expected


def test_where_the_system_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "absent")
    assert available_bytes(CPU) > 100_000_000
