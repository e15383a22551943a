"""What the pipeline tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A training step (or, without training, a whole block) is done."""

    block: int
    num_blocks: int
    step: int
    """Steps of this block done so far."""
    num_steps: int
    loss: float | None

    @property
    def share_done(self) -> float:
        """Of all blocks, in [0, 1]."""
        return (self.block + self.step / self.num_steps) / self.num_blocks


OnEvent = Callable[[Step], None]


def ignore(_event: Step) -> None:
    """For callers who do not watch."""
