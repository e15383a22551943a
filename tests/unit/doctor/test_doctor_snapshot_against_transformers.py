"""Which tensors Transformers reads, and in which order: our rule against its own code."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support.sparse_checkpoints import write_index, write_shard
from transformers.core_model_loading import dot_natural_key
from transformers.modeling_utils import _get_resolved_checkpoint_files

from nybble.doctor.engines import Family
from nybble.doctor.snapshot import take_snapshot
from nybble.doctor.source import LocalSource

FILES = ["model.safetensors", "mtp.safetensors", "model-2.safetensors", "model-10.safetensors"]
NAMES = ["x.9.w", "x.10.w", "x.w9", "x.w10", "x.y.w", "lm_head", "mtp.0.w", "mtp.fc"]


def really_loaded(folder: Path) -> list[tuple[str, str]]:
    """As from_pretrained does it: the files, their tensors, sorted; none where it raises."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            str(folder), None, None, None, None, is_remote_code=False
        )
    except OSError:
        return []
    merged: dict[str, str] = {}
    for file in files or ():
        text = Path(file).read_bytes()
        header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
        merged |= dict.fromkeys(header, Path(file).name)
    return [(name, merged[name]) for name in sorted(merged, key=dot_natural_key)]


@pytest.mark.parametrize("seed", range(30))
def test_the_same_tensors_in_the_same_order(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    weight_map = {}
    files = dice.sample(FILES, dice.randint(1, 4))
    for file in files:
        names = dice.sample(NAMES, dice.randint(1, 6))
        write_shard(tmp_path / file, dict.fromkeys(names, (1,)))
        if dice.random() < 0.8:
            weight_map |= dict.fromkeys(names[: dice.randint(1, 6)], file)
    if dice.random() < 0.8:
        write_index(tmp_path, weight_map)
    found = take_snapshot(LocalSource(tmp_path)).loaded_by(Family.TRANSFORMERS)
    assert [(name, info.file.name) for name, info in found.items()] == really_loaded(tmp_path)
