"""All that the checks look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nybble.doctor.engines import Engine
from nybble.doctor.findings import Finding
from nybble.doctor.layout.spec import Layout
from nybble.doctor.resolve.built import Block
from nybble.doctor.simulate import Simulation
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.stored import Stored


@dataclass(frozen=True)
class Case:
    """A checkpoint, what its config calls for, and what each engine would build."""

    snapshot: Snapshot
    block: Block | None
    """config.json's ``quantization_config``; None: there is none, or it is no object."""
    layout: Layout | None
    """None: the architecture is unknown, or config.json is unusable."""
    layout_problem: str | None
    """What is wrong with the numbers of config.json, of an architecture that is known."""
    stored: Mapping[str, Stored]
    """By Linear; empty without a layout."""
    simulations: tuple[Simulation, ...]
    """One per engine that was asked for; empty without a layout."""
    engines: tuple[Engine, ...]
    base: Snapshot | None = None
    """The BF16 checkpoint it was made from, if the user gave it."""
    tensor_parallel: int = 1
    """The number of devices that share each module."""


Check = Callable[[Case], Iterable[Finding]]
"""One check: yields findings of one code, and never raises."""
