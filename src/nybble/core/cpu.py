"""CPU arithmetic settings."""

from __future__ import annotations

import torch


def flush_denormals() -> None:
    """Makes this process treat numbers below 1.2e-38 as zero.

    Gated DeltaNet multiplies by decays that underflow into denormal numbers, on which CPUs take
    a slow path: its matrix products ran 8 times slower (docs/LOG.md). Threads started later
    inherit the setting, so call it before the first parallel operation.
    """
    torch.set_flush_denormal(True)
