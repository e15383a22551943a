"""What the rest of the program needs to know of an architecture, as plain data.

An architecture is one file that makes an ``Architecture`` from a checkpoint's config.json. No
other package asks for a model type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class KeepRule:
    """Tensors that stay as they are, and why."""

    pattern: str
    """Regular expression over the whole tensor name."""
    part: str
    reason: str


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same input; engines fuse them, so they share a grid."""

    members: tuple[str, ...]
    """Module names relative to the block."""
    part: str
    fused: str
    """What engines call the one module they make of them; a lone member's own name."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of each block: gated MLPs that transformers holds as two stacks.

    Of E experts, ``gate_up_proj`` is [E, 2 inner, hidden] and ``down_proj`` [E, hidden, inner].
    A checkpoint holds these stacks, or each expert's three Linears; a quantized one the latter.
    """

    module: str
    """Name relative to the block, e.g. ``mlp.experts``."""
    count: int

    def stacked_modules(self, parameter: str) -> tuple[str, ...]:
        """Names of the Linears of a stack in the order of its rows; empty for another parameter."""
        owner, _, stack = parameter.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(stack)
        if parts is None or not owner.endswith(f".{self.module}"):
            return ()
        return tuple(f"{owner}.{i}.{part}" for i in range(self.count) for part in parts)


@dataclass(frozen=True)
class MtpSpec:
    """The multi-token-prediction head of a checkpoint: a fusion, one decoder layer, a norm."""

    declared: bool
    """Whether config.json calls for it; else there is one if any of its tensors is stored."""
    prefix: str
    layer_prefix: str
    """What precedes the names of its decoder layer's tensors, e.g. ``mtp.layers.0.``."""
    input_groups: tuple[InputGroup, ...]
    """Of its decoder layer."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of every tensor of the head, by full name."""
    build: Callable[[], nn.Module]
    """The head as a module; its parameter names are the tensors' without the prefix."""


@dataclass(frozen=True)
class Architecture:
    """One checkpoint's architecture."""

    name: str
    text_config: PreTrainedConfig
    text_prefix: str
    """What precedes the text model's own parameter names, e.g. ``model.language_model.``."""
    num_blocks: int
    layer_kinds: tuple[str, ...]
    """What each block attends with: ``full``, ``sliding`` (a window) or ``linear``."""
    lm_head: str
    """Tensor name of the output head (the embedding's own where they are tied)."""
    input_groups: tuple[InputGroup, ...]
    keep_rules: tuple[KeepRule, ...]
    mtp: MtpSpec | None
    build_text_model: Callable[[], PreTrainedModel]
    """The text model without its head; build it under ``torch.device("meta")``."""
    embedding_scale: float = 1.0
    """What the model multiplies its token embeddings with, rounded to their dtype first."""
    experts: Experts | None = None

    @property
    def blocks_prefix(self) -> str:
        """Name of the list of decoder blocks, e.g. ``model.language_model.layers``."""
        return f"{self.text_prefix}layers"

    @property
    def embedding(self) -> str:
        """Tensor name of the input embedding."""
        return f"{self.text_prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        """Tensor name of the norm between the last block and the head."""
        return f"{self.text_prefix}norm.weight"

    def block_prefix(self, index: int) -> str:
        """What precedes the names of one block's tensors; the MTP layer counts as the last."""
        if self.mtp is not None and index == self.num_blocks:
            return self.mtp.layer_prefix
        return f"{self.blocks_prefix}.{index}."


Config = Mapping[str, Any]
"""A parsed config.json."""
