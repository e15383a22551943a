"""What a model is made of, computed from its config.json alone: no weight, no modelling code.

A ``Layout`` speaks in the checkpoint's names, ``modules`` in those of an engine, which fuses some
Linears and gives others another prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from nybble.doctor.findings import Part

LM_HEAD = "lm_head"
"""Name of the output head in a checkpoint."""

TOWERS = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")
"""What the names of a vision tower's tensors begin with, and those of its projector."""


def part_of(name: str) -> Part:
    """The part that a tensor or Linear belongs to, by its name in the checkpoint."""
    if name.startswith("mtp."):
        return Part.MTP
    return Part.VISION if name.startswith(TOWERS) else Part.TRUNK


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix that some engine may build quantized."""

    name: str
    """In the checkpoint, without ``.weight``."""
    shape: tuple[int, int]
    """[N, K]: outputs, inputs."""
    part: Part


@dataclass(frozen=True)
class Layout:
    """Every tensor that a BF16 checkpoint of this config holds."""

    architecture: str
    """Of config.json."""
    tensors: Mapping[str, tuple[int, ...]]
    """Shapes by name, the Linears' ``.weight`` among them. Without those of a tied output head."""
    linears: Mapping[str, Linear]
    """By name; every expert of a mixture one by one, stacked or not."""
    stacks: Mapping[str, tuple[str, ...]]
    """Names of tensors that may stand for many Linears (a block's experts) -> those Linears, in
    order."""
    blocks: str
    """Name of the decoder's list of blocks: 'model.language_model.layers'."""
    has_mtp: bool
    """Whether config.json calls for an MTP head."""
    is_wrapper: bool
    """Whether it is the vision-language form, whose decoder is ``model.language_model``."""
    tied: bool
    """Whether the output head is the embedding; for Transformers, which asks the top level."""
    ties_disagree: bool = False
    """Whether the decoder's own config says the opposite: some engines go by that
    (vllm#51063). Then ``linears`` has an output head, because one of them builds it."""

    def part_of(self, name: str) -> Part:
        """The part that a tensor or Linear belongs to, by its name."""
        return part_of(name)


class Kind(StrEnum):
    """How an engine treats a module; it decides which rules apply."""

    LINEAR = "linear"
    """A parallel Linear that takes the quantization config."""
    HEAD = "head"
    """The output head: ``ParallelLMHead``."""
    EXPERTS = "experts"
    """All routed experts of a block, as one module."""
    PLAIN = "plain"
    """Built without the quantization config, so always dense."""


@dataclass(frozen=True, slots=True)
class Module:
    """What an engine builds as one: a Linear, several fused, or a block's experts."""

    name: str
    """As the engine calls it while it builds: the name that rules are matched with."""
    members: tuple[Linear, ...]
    """In the order in which they are fused."""
    kind: Kind
    part: Part
