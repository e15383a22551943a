"""What an engine builds a module as, and what a Linear is stored as, in the same terms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Block = dict[str, Any]
"""config.json's ``quantization_config``."""


class Storage(StrEnum):
    """Families of tensors that hold one Linear."""

    DENSE = "dense"
    """``.weight`` in a float type."""
    GPTQ = "gptq"
    """``.qweight`` I32 [K/p, N], ``.scales`` [G, N], ``.qzeros`` I32 [G, N/p], ``.g_idx`` [K]."""
    AWQ = "awq"
    """``.qweight`` I32 [K, N/p], ``.scales`` [G, N], ``.qzeros`` I32 [G, N/p]."""
    PACKED = "pack-quantized"
    """``.weight_packed`` I32 [N, K/p], ``.weight_scale`` [N, G], ``.weight_shape``."""
    INT8 = "int-quantized"
    """``.weight`` I8 [N, K] and ``.weight_scale``."""
    FP8 = "fp8"
    """``.weight`` F8_E4M3 [N, K] and ``.weight_scale`` or ``.weight_scale_inv``."""
    FP4 = "fp4"
    """``.weight`` or ``.weight_packed`` U8 [N, K/2] and block scales: nvfp4, mxfp4."""
    BNB = "bitsandbytes"
    """``.weight`` U8 or I8 with ``.absmax`` or ``.SCB`` beside it."""


@dataclass(frozen=True)
class Scheme:
    """A way to hold one Linear. Fields that a side does not know are None and agree with all."""

    storage: Storage
    bits: int | None = None
    group_size: int | None = None
    """-1: one scale per output."""
    symmetric: bool | None = None

    def agrees(self, other: Scheme) -> bool:
        """Whether an engine that builds the one can load the other."""
        if self.storage is not other.storage:
            return False
        pairs = (
            (self.bits, other.bits),
            (self.group_size, other.group_size),
            (self.symmetric, other.symmetric),
        )
        return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)

    def __str__(self) -> str:
        """'INT4 group 128 (gptq)', 'dense'."""
        if self.storage is Storage.DENSE:
            return "dense"
        if self.storage in (Storage.FP8, Storage.FP4, Storage.BNB):
            return self.storage.value
        bits = "INT?" if self.bits is None else f"INT{self.bits}"
        group = "" if self.group_size is None else f" group {self.group_size}"
        if self.group_size == -1:
            group = " per channel"
        asymmetric = " asymmetric" if self.symmetric is False else ""
        return f"{bits}{group}{asymmetric} ({self.storage.value})"


DENSE = Scheme(Storage.DENSE)


@dataclass(frozen=True)
class Refusal:
    """The engine raises while it reads the config or builds the module."""

    exception: str
    """'ValueError'."""
    message: str
    """What it says, in essence, one line."""
    evidence: str = ""
    """Where the engine does so: 'vLLM 0.32, inc/config_parser.py'."""


@dataclass(frozen=True)
class NotAnalysed:
    """No rule is known here: the doctor says so and predicts nothing."""

    why: str


Built = Scheme | Refusal | NotAnalysed
