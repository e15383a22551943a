"""Checks a finished result before it may take its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nybble.arch.plan import TensorPlan
from nybble.arch.registry import architecture_of
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError
from nybble.engine.stored import stored_grids


def verify_result(folder: Path, base: CheckpointReader, plan: TensorPlan) -> None:
    """Re-reads a result from the disk and compares it with its base and its plan.

    Every tensor must be stored as config.json declares it, quantized exactly where planned, and
    every kept tensor must equal the base's, byte for byte. Raises CheckpointError.
    """
    with CheckpointReader(folder) as result:
        added = {"quantization_config": result.config.get("quantization_config")}
        key = first_difference(result.config, {**base.config, **added})
        if key:
            raise CheckpointError(f"config.json of the result differs from the base's in {key}")
        grids = stored_grids(architecture_of(result.config), result.index, result.config)
        packed = {name for name, grid in grids.items() if grid is not None}
        planned = {name for name, _ in plan.all_quantized()}
        if packed != planned:
            odd = sorted(packed ^ planned)[0]
            raise CheckpointError(f"{odd} is stored otherwise than planned")
        for name, _ in plan.kept():
            if name not in result.index or bytes_differ(result, base, name):
                raise CheckpointError(f"{name} in the result is not the base's, byte for byte")


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Dotted name of the first key whose values differ, or that only one has; else empty."""
    for key in {**one, **other}:
        mine, theirs = one.get(key), other.get(key)
        if mine != theirs or (key in one) != (key in other):
            if isinstance(mine, dict) and isinstance(theirs, dict):
                return f"{key}.{first_difference(mine, theirs)}"
            return key
    return ""


def bytes_differ(one: CheckpointReader, other: CheckpointReader, name: str) -> bool:
    """Whether a tensor's type, shape or bytes differ between two checkpoints."""
    mine, theirs = one.index.tensors[name], other.index.tensors[name]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return True
    pieces = zip(one.raw_chunks(name), other.raw_chunks(name), strict=True)
    # As bytes: comparing memoryviews goes element by element.
    return any(bytes(a) != bytes(b) for a, b in pieces)
