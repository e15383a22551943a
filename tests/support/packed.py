"""Reads GPTQ v1 tensors with numpy alone, so that nybble's own unpacking is not its own judge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def codes_and_scales(
    tensors: Mapping[str, torch.Tensor], module: str, bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [N, K] and the scale of every weight [N, K], both float64."""
    words = tensors[f"{module}.qweight"].numpy().view(np.uint32)
    lanes = [(words >> (bits * lane)) & (2**bits - 1) for lane in range(32 // bits)]
    codes = np.stack(lanes, axis=1).reshape(-1, words.shape[1]).T.astype(np.float64)
    scales = tensors[f"{module}.scales"].to(torch.float64).numpy().T
    group_size = codes.shape[1] // scales.shape[1]
    return codes - 2 ** (bits - 1), np.repeat(scales, group_size, axis=1)


def dense(tensors: Mapping[str, torch.Tensor], module: str, bits: int = 4) -> torch.Tensor:
    """The weight that an engine computes with, float32 [N, K]."""
    codes, scales = codes_and_scales(tensors, module, bits)
    return torch.from_numpy(codes * scales).float()
