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


@dataclass(frozen=True)
class MtpSpec:
    """The multi-token-prediction head of a checkpoint."""

    prefix: str
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
    lm_head: str
    """Tensor name of the output head (the embedding's own where they are tied)."""
    input_groups: tuple[InputGroup, ...]
    keep_rules: tuple[KeepRule, ...]
    mtp: MtpSpec | None
    build_text_model: Callable[[], PreTrainedModel]
    """The text model without its head; build it under ``torch.device("meta")``."""

    @property
    def blocks_prefix(self) -> str:
        """Name of the list of decoder blocks, e.g. ``model.language_model.layers``."""
        return f"{self.text_prefix}layers"

    @property
    def embedding(self) -> str:
        """Tensor name of the input embedding."""
        return f"{self.text_prefix}embed_tokens.weight"

    def block_prefix(self, index: int) -> str:
        """What precedes the names of one block's tensors."""
        return f"{self.blocks_prefix}.{index}."


Config = Mapping[str, Any]
"""A parsed config.json."""
