"""Checkpoints of any size that take no space: real headers, bodies of zeros that are never written.

Without torch, so that hundreds of shards are made in no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nybble.checkpoint.headers import ITEM_BYTES

Shape = Sequence[int]


def write_shard(
    path: Path,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """One safetensors file, in BF16 but for the tensors that ``dtypes`` names."""
    header, at = {}, 0
    for name, shape in shapes.items():
        dtype = dtypes.get(name, "BF16")
        size = ITEM_BYTES[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def write_sharded(folder: Path, shards: Sequence[Mapping[str, Shape]]) -> None:
    """config.json, shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, shapes)
        weight_map |= dict.fromkeys(shapes, file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text('{"model_type": "qwen3_5"}', encoding="utf-8")


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int = 0) -> None:
    """model.safetensors.index.json."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index), encoding="utf-8")
