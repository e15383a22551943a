"""How far a quantized weight is from the original."""

from __future__ import annotations

import math

import torch

from nybble.quant.grid import QuantizedWeight


def sqnr_db(weight_OI: torch.Tensor, quantized: QuantizedWeight) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum w^2 / sum (w - wq)^2)."""
    weight = weight_OI.float()
    signal = float(weight.square().sum())
    noise = float((weight - quantized.dequantize()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)


def relative_output_error(
    weight_OI: torch.Tensor, quantized: QuantizedWeight, mean_square_I: torch.Tensor
) -> float:
    """E|x (W - Wq)^T|^2 / E|x W^T|^2 for inputs x of uncorrelated channels.

    ``mean_square_I``: E[x_i^2] of each input channel.
    """
    weight = weight_OI.float()
    error = (weight - quantized.dequantize()).square() @ mean_square_I
    output = weight.square() @ mean_square_I
    return float(error.sum()) / max(float(output.sum()), 1e-30)
