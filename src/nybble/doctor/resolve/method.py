"""What a quantization method is to the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nybble.doctor.engines import Engine
from nybble.doctor.layout.spec import Layout, Module
from nybble.doctor.resolve.built import Block, Built, Refusal
from nybble.doctor.resolve.patterns import Patterns


@dataclass(frozen=True, eq=False)
class Context:
    """What an engine knows when it reads a declaration. One object is one reading: what a method
    works out of the block once, it may keep by it."""

    engine: Engine
    layout: Layout
    block: Block
    packed: frozenset[str]
    """Linears with a tensor of integers in any safetensors file of the folder, listed or not: from
    these vLLM derives which modules a GPTQ checkpoint quantizes, if its config does not say."""
    patterns: Patterns = field(default_factory=Patterns)
    """Tries the block's regular expressions; better shared by all engines."""


@dataclass(frozen=True)
class Method:
    """The rules of one ``quant_method``, for all engines."""

    name: str
    refusal: Callable[[Context], Refusal | None]
    """Whether the engine refuses the declaration as a whole."""
    resolve: Callable[[Context, Module], Built]
    """What the engine builds a module as. Kind.PLAIN never comes here: it is dense."""
