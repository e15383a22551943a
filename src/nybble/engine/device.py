"""Where the arithmetic runs, and in which type."""

from __future__ import annotations

import torch

from nybble.core.cpu import flush_denormals
from nybble.core.errors import RecipeError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is any, else the CPU; raises RecipeError for an absent one."""
    flush_denormals()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise RecipeError(f"device {name!r} is not cpu, cuda, cuda:N or auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device {name!r} is not usable here: {str(error).splitlines()[0]}"
        ) from (error)
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU, where it is as fast and exact; bfloat16 on accelerators."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
