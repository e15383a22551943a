"""Reads packed tensors with numpy alone, so that nybble's own unpacking is not its own judge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def codes_and_scales(
    tensors: Mapping[str, torch.Tensor], module: str, bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Signed codes [N, K] and the scale of every weight [N, K], both float64.

    The tensors are those of GPTQ, or else of compressed-tensors.
    """
    if f"{module}.qweight" in tensors:
        words = tensors[f"{module}.qweight"].numpy().T
        scales = tensors[f"{module}.scales"].to(torch.float64).numpy().T
    else:
        words = tensors[f"{module}.weight_packed"].numpy()
        scales = tensors[f"{module}.weight_scale"].to(torch.float64).numpy()
    little_endian = np.ascontiguousarray(words).astype("<i4").view(np.uint8)
    stream = np.unpackbits(little_endian, axis=1, bitorder="little")
    digits = stream.reshape(len(stream), -1, bits).astype(np.float64)
    codes = digits @ 2.0 ** np.arange(bits) - 2 ** (bits - 1)
    group_size = codes.shape[1] // scales.shape[1]
    return codes, np.repeat(scales, group_size, axis=1)


def dense(tensors: Mapping[str, torch.Tensor], module: str, bits: int = 4) -> torch.Tensor:
    """The weight that an engine computes with, float32 [N, K]."""
    codes, scales = codes_and_scales(tensors, module, bits)
    return torch.from_numpy(codes * scales).float()
