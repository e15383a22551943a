"""Checks a finished result before it may take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nybble.arch.plan import TensorPlan
from nybble.arch.registry import architecture_in
from nybble.checkpoint.reader import CheckpointReader
from nybble.core.errors import CheckpointError
from nybble.engine.stored import stored_grids
from nybble.pipeline.assemble import target_of


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
        arch = architecture_in(result.config, result.index)
        grids = stored_grids(arch, result.index, result.config)
        packed = {name for name, grid in grids.items() if grid is not None}
        planned = {name for name in plan.sources if target_of(plan, name) is not None}
        if packed != planned:
            odd = sorted(packed ^ planned)[0]
            raise CheckpointError(f"{odd} is stored otherwise than planned")
        for name, fate in plan.kept():
            if fate.modules:
                differ = rows_differ(result, base, name, fate.modules)
            else:
                differ = name not in result.index or bytes_differ(result, base, name)
            if differ:
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


def rows_differ(
    parts: CheckpointReader, whole: CheckpointReader, name: str, modules: Sequence[str]
) -> bool:
    """Whether the Linears ``modules`` are not, one below the other, another checkpoint's stack."""
    rows = whole.view(name).flatten(0, -2).chunk(len(modules))
    differ = False
    for module, expected in zip(modules, rows, strict=True):
        found = parts.view(f"{module}.weight")  # there, as its shape has been checked
        as_bytes = [tensor.view(torch.uint8) for tensor in (found, expected)]
        differ |= found.dtype != expected.dtype or not torch.equal(*as_bytes)
        parts.release()
    whole.release()
    return differ


def bytes_differ(one: CheckpointReader, other: CheckpointReader, name: str) -> bool:
    """Whether a tensor's type, shape or bytes differ between two checkpoints."""
    mine, theirs = one.index.tensors[name], other.index.tensors[name]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return True
    pieces = zip(one.raw_chunks(name), other.raw_chunks(name), strict=True)
    # As bytes: comparing memoryviews goes element by element.
    return any(bytes(a) != bytes(b) for a, b in pieces)
