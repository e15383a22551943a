"""Second moments of a linear's inputs: what GPTQ and the importance of channels are made of.

Knows tensors only. Legend for shapes: I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nybble.core.errors import QuantizationError

_STRIP = 1024
"""Rows of the second moment updated at once; each strip starts at its diagonal."""


@contextmanager
def full_float32_products() -> Iterator[None]:
    """Matrix products of float32 are computed in float32 inside, whatever the process has set.

    TF32 on CUDA and BF16 in oneDNN keep 10 and 7 bits of a factor. A Hessian's small eigenvalues,
    which decide where GPTQ moves its errors, lie far below that.
    """
    onednn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch adds it at import
    backends = (torch.backends.cuda.matmul, onednn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class InputMoments:
    """Sums of x xᵀ, or of x² alone, over the tokens x [I] that reached one input.

    ``sums`` (float32, [I, I] or [I], on the given device) and ``tokens`` are plain sums, so parts
    counted apart add up. Of ``sums`` [I, I] only the part on and above the diagonal
    has a meaning: the rest would double the arithmetic and is mirrored in the end.
    """

    def __init__(self, in_features: int, device: torch.device, full: bool) -> None:
        shape = (in_features, in_features) if full else (in_features,)
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Counts every vector of ``inputs`` [..., I] in; leave padding out before.

        Any float dtype: the arithmetic is float32. No temporary is larger than the inputs.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.sums.device, torch.float32)
        self.tokens += len(rows)
        if self.sums.ndim == 1:
            self.sums += rows.square().sum(dim=0)
            return
        with full_float32_products():
            for start in range(0, len(self.sums), _STRIP):
                strip = self.sums[start : start + _STRIP, start:]
                strip.addmm_(rows[:, start : start + _STRIP].T, rows[:, start:])

    def second_moment(self) -> torch.Tensor:
        """E[x xᵀ], float32 [I, I]: a new tensor.

        Raises QuantizationError if no token was counted.
        """
        assert self.sums.ndim == 2, "only the diagonal was counted"
        moment = self.sums / self._counted()
        for start in range(0, len(moment), _STRIP):
            stop = start + _STRIP
            moment[stop:, start:stop] = moment[start:stop, stop:].T
        return moment

    def mean_square(self) -> torch.Tensor:
        """E[x²] of each channel, float32 [I]; raises QuantizationError if no token was counted."""
        sums = self.sums if self.sums.ndim == 1 else self.sums.diagonal()
        return sums / self._counted()

    def _counted(self) -> int:
        if not self.tokens:
            raise QuantizationError(
                f"no calibration token reached an input of {len(self.sums)} channels: "
                "use more calibration rows"
            )
        return self.tokens
