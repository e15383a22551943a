"""Whether a whole model, de-quantized, fits where it is to run."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from nybble.core.errors import CheckpointError
from nybble.engine.stream import Arithmetic
from nybble.engine.weights import ModelWeights

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")


def refuse_too_large(weights: ModelWeights, how: Arithmetic, tokens: int) -> None:
    """Raises CheckpointError, with the arithmetic, for a model that memory does not hold.

    ``tokens``: positions whose logits are held at once (twice: as computed, and in float32).
    """
    parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    size = how.dtype.itemsize
    for_weights, for_logits = parameters * size, tokens * weights.vocab_size * (size + 4)
    free = available_bytes(how.device)
    if for_weights + for_logits <= free:
        return
    raise CheckpointError(
        f"{weights.reader.index.folder} does not fit into memory as a whole: "
        f"{parameters:,} parameters x {size} bytes = {_gigabytes(for_weights)}, and "
        f"{_gigabytes(for_logits)} of logits, but {how.device.type} has {_gigabytes(free)} free: "
        "leave out --on-policy, or give --dtype bfloat16, fewer --new-tokens or another --device"
    )


def available_bytes(device: torch.device) -> int:
    """What can be taken without swapping: of the machine, or what its container may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = _MEMINFO.read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return free if limit == "max" else min(free, int(limit))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
