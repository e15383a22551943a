"""How far a quantized weight is from the original."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from nybble.quant.grid import QuantizedWeight, row_chunks
from nybble.quant.moments import full_float32_products

MEASURED_ROWS = 512
"""Output rows that the error over correlated channels is measured on, at most."""


def sqnr_db(weight_OI: torch.Tensor, quantized: QuantizedWeight) -> float:
    """Signal to quantization noise ratio in decibels: 10 log10(sum w^2 / sum (w - wq)^2)."""
    signal = noise = 0.0
    for weight, dense in _chunks(weight_OI, quantized):
        signal += float(weight.square().sum())
        noise += float((weight - dense).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-30) / noise)


def relative_output_error(
    weight_OI: torch.Tensor, quantized: QuantizedWeight, mean_square_I: torch.Tensor
) -> float:
    """E|x (W - Wq)^T|^2 / E|x W^T|^2 for inputs x of uncorrelated channels.

    ``mean_square_I``: E[x_i^2] of each input channel.
    """
    error = output = 0.0
    for weight, dense in _chunks(weight_OI, quantized):
        error += float(((weight - dense).square() @ mean_square_I).sum())
        output += float((weight.square() @ mean_square_I).sum())
    return error / max(output, 1e-30)


def correlated_output_error(
    weight_OI: torch.Tensor, quantized: QuantizedWeight, second_moment_II: torch.Tensor
) -> float:
    """E|x (W - Wq)^T|^2 / E|x W^T|^2 for inputs x of any second moment E[x x^T].

    Measured on at most MEASURED_ROWS evenly spaced output rows: all of them would cost as much as
    GPTQ itself, and these hold a large weight's ratio to a few percent.
    """
    outs = len(weight_OI)
    count = min(outs, MEASURED_ROWS)
    rows = torch.arange(count, device=weight_OI.device) * outs // count
    part = QuantizedWeight(quantized.codes[rows], quantized.scales[rows], quantized.grid)
    weight = weight_OI[rows].float()
    error = _output_power(weight - part.dequantize(), second_moment_II)
    return max(error, 0.0) / max(_output_power(weight, second_moment_II), 1e-30)


def _output_power(weight_OI: torch.Tensor, second_moment_II: torch.Tensor) -> float:
    with full_float32_products():
        return float((weight_OI @ second_moment_II).mul_(weight_OI).sum())


def _chunks(
    weight_OI: torch.Tensor, quantized: QuantizedWeight
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The weight and what its codes stand for, float32, some rows at a time."""
    for rows in row_chunks(weight_OI):
        part = QuantizedWeight(quantized.codes[rows], quantized.scales[rows], quantized.grid)
        yield weight_OI[rows].float(), part.dequantize()
