"""The calibration rows on their way through the model.

Two streams advance block by block: what the base computes (the targets), and what the blocks
quantized so far compute (the inputs the next block will really see). Both live on the host in
the compute dtype: 2 x rows x seqlen x hidden x itemsize bytes. A block's outputs replace its
inputs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_ROWS_PER_PASS = 8


@dataclass(frozen=True)
class Streams:
    """Hidden states of all rows before (or after) some block, [R, T, D] each."""

    base: torch.Tensor
    quantized: torch.Tensor
    device: torch.device

    @staticmethod
    def begin(embedded: torch.Tensor, device: torch.device) -> Streams:
        """Both streams start at the embeddings, [R, T, D]."""
        return Streams(embedded, embedded.clone(), device)

    @torch.no_grad()
    def advance_base(self, block: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces the base stream by the block's outputs."""
        for rows in self._passes():
            self.base[rows] = block(self.base[rows].to(self.device)).cpu()

    @torch.no_grad()
    def advance_quantized(self, block: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Replaces the quantized stream; returns its mean squared distance to the base stream."""
        total = 0.0
        for rows in self._passes():
            output = block(self.quantized[rows].to(self.device)).cpu()
            total += float((output.float() - self.base[rows].float()).square().sum())
            self.quantized[rows] = output
        return total / self.base.numel()

    def training_batches(
        self, batch_size: int, seed: int, block: int
    ) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
        """step -> (inputs, targets), rows shuffled anew each time all of them were used.

        The order depends on seed, block and step alone, not on what ran before.
        """
        num_rows = len(self.base)
        batch_size = min(batch_size, num_rows)
        per_epoch = num_rows // batch_size

        def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
            epoch, place = divmod(step, per_epoch)
            generator = torch.Generator().manual_seed(seed + 1_000_003 * block + 7919 * epoch)
            order = torch.randperm(num_rows, generator=generator)
            rows = order[place * batch_size : (place + 1) * batch_size]
            return self.quantized[rows].to(self.device), self.base[rows].to(self.device)

        return batch

    def _passes(self) -> Iterator[slice]:
        for start in range(0, len(self.base), _ROWS_PER_PASS):
            yield slice(start, start + _ROWS_PER_PASS)
