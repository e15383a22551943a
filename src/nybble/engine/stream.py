"""What a model computes on rows of text, with the weights of one block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nybble.arch.blocks import BlockRunner
from nybble.engine.weights import ModelWeights

OnBlock = Callable[[int, int], None]
"""(blocks done, of how many)."""


def silent(_done: int, _of: int) -> None:
    """For those who do not watch."""


@dataclass(frozen=True)
class Arithmetic:
    """Where and how a model is evaluated."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of weights, activations and matrix products."""
    rows_per_pass: int = 8

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device.type}"


@torch.no_grad()
def final_states(
    weights: ModelWeights,
    token_ids: torch.Tensor,
    how: Arithmetic,
    on_block: OnBlock = silent,
) -> torch.Tensor:
    """Hidden states after the final norm, [R, T, D] in the arithmetic's type, on the CPU.

    ``token_ids`` is int64 [R, T]. All rows pass a block before the next one is read.
    """
    arch = weights.arch
    runner = BlockRunner(arch, token_ids.shape[1], how.device, how.dtype)
    hidden = weights.embedded(token_ids, how.dtype)
    for index in range(arch.num_blocks):
        block = weights.block(index, how.device, how.dtype)
        for rows in _passes(len(hidden), how):
            hidden[rows] = runner(index, block, hidden[rows].to(how.device)).cpu()
        del block  # before the next one is read: no two of them are in memory at once
        on_block(index + 1, arch.num_blocks)
    norm = weights.parameter(arch.final_norm).to(how.device, how.dtype)
    for rows in _passes(len(hidden), how):
        hidden[rows] = runner.final_norm(norm, hidden[rows].to(how.device)).cpu()
    return hidden


def _passes(count: int, how: Arithmetic) -> Iterator[slice]:
    for start in range(0, count, how.rows_per_pass):
        yield slice(start, start + how.rows_per_pass)
