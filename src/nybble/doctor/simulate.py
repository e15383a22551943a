"""What an engine makes of a checkpoint's declaration: module by module, from names alone."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.doctor.engines import Engine
from nybble.doctor.layout.modules import modules
from nybble.doctor.layout.spec import Kind, Layout, Module
from nybble.doctor.resolve.built import DENSE, Block, Built, Refusal
from nybble.doctor.resolve.method import Context
from nybble.doctor.resolve.methods import method_of
from nybble.doctor.resolve.patterns import Patterns
from nybble.doctor.snapshot import Snapshot
from nybble.doctor.stored import packed_names


@dataclass(frozen=True)
class Simulation:
    """One engine's reading of the declaration."""

    engine: Engine
    refusal: Refusal | None
    """It refuses the declaration as a whole; then ``built`` is empty."""
    built: tuple[tuple[Module, Built], ...]
    """Every module, in the order in which the engine builds them."""


def simulate(
    snapshot: Snapshot,
    layout: Layout,
    block: Block | None,
    engine: Engine,
    patterns: Patterns,
) -> Simulation:
    """What one engine builds, by its rules for the ``quant_method`` that the block names.

    Without a block, everything is dense. ``patterns`` tries its regular expressions, for all
    engines within one budget.
    """
    found = modules(layout, engine)
    method = None if block is None else method_of(block)
    if block is None or method is None:
        return Simulation(engine, None, tuple((module, DENSE) for module in found))
    context = Context(engine, layout, block, packed_names(snapshot), patterns)
    refusal = method.refusal(context)
    if refusal is not None:
        return Simulation(engine, refusal, ())
    built = tuple(
        (module, DENSE if module.kind is Kind.PLAIN else method.resolve(context, module))
        for module in found
    )
    return Simulation(engine, None, built)
