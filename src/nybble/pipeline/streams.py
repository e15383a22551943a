"""The calibration rows on their way through the model.

The quantized stream is what the blocks quantized so far compute: the inputs the next block will
really see. Where rounding is learned there is a second one, what the base computes: the targets.
They live on the host in the compute dtype: rows x seqlen x hidden x itemsize bytes each. A
block's outputs replace its inputs in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

_ROWS_PER_PASS = 8


@dataclass(frozen=True)
class Batch:
    """Some rows on the compute device."""

    hidden: torch.Tensor
    """[B, T, D]"""
    mask: torch.Tensor | None
    """bool [B, T], False where a row is padded; None: nowhere."""

    def real(self, outputs: torch.Tensor) -> torch.Tensor:
        """Of outputs [B, T, D] those of real tokens, [N, D] (all, as they are, without padding)."""
        return outputs if self.mask is None else outputs[self.mask]


@dataclass(frozen=True)
class Streams:
    """Hidden states of all rows before (or after) some block, [R, T, D] each."""

    quantized: torch.Tensor
    base: torch.Tensor | None
    """None where no targets are needed."""
    mask: torch.Tensor | None
    """bool [R, T], False where a row is padded; None: nowhere."""
    device: torch.device

    @torch.no_grad()
    def scan(self, visit: Callable[[Batch], object]) -> None:
        """Shows the quantized stream, some rows at a time."""
        for rows in self._passes():
            visit(self._batch(rows))

    @torch.no_grad()
    def advance_base(self, block: Callable[[Batch], torch.Tensor]) -> None:
        """Replaces the base stream by the block's outputs."""
        assert self.base is not None
        for rows in self._passes():
            mask = None if self.mask is None else self.mask[rows].to(self.device)
            self.base[rows] = block(Batch(self.base[rows].to(self.device), mask)).cpu()

    @torch.no_grad()
    def advance_quantized(self, block: Callable[[Batch], torch.Tensor]) -> float | None:
        """Replaces the quantized stream; returns its mean squared distance to the base stream."""
        total, count = 0.0, 0
        for rows in self._passes():
            output = block(self._batch(rows)).cpu()
            self.quantized[rows] = output
            if self.base is not None:
                squares = (output.float() - self.base[rows].float()).square()
                squares = squares if self.mask is None else squares[self.mask[rows]]
                total += float(squares.sum())
                count += squares.numel()
        return total / count if count else None

    def training_batches(
        self, batch_size: int, seed: int, block: int
    ) -> Callable[[int], tuple[Batch, torch.Tensor]]:
        """step -> (inputs, targets of their real tokens), rows shuffled anew when all were used.

        The order depends on seed, block and step alone, not on what ran before.
        """
        base = self.base
        assert base is not None
        num_rows = len(base)
        batch_size = min(batch_size, num_rows)
        per_epoch = num_rows // batch_size

        def batch(step: int) -> tuple[Batch, torch.Tensor]:
            epoch, place = divmod(step, per_epoch)
            generator = torch.Generator().manual_seed(seed + 1_000_003 * block + 7919 * epoch)
            order = torch.randperm(num_rows, generator=generator)
            rows = order[place * batch_size : (place + 1) * batch_size]
            inputs = self._batch(rows)
            return inputs, inputs.real(base[rows].to(self.device))

        return batch

    def _batch(self, rows: slice | torch.Tensor) -> Batch:
        mask = None if self.mask is None else self.mask[rows].to(self.device)
        return Batch(self.quantized[rows].to(self.device), mask)

    def _passes(self) -> Iterator[slice]:
        for start in range(0, len(self.quantized), _ROWS_PER_PASS):
            yield slice(start, start + _ROWS_PER_PASS)
