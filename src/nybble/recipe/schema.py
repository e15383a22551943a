"""What the user asks for, as one frozen, validated value. Unknown keys are errors."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ScaleInit = Literal["minmax", "mse", "importance"]
Format = Literal["auto_round"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Scheme(_Frozen):
    """The integer grid of a quantized weight: symmetric, one scale per group of inputs."""

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: int = 128
    """Input channels that share one scale; -1: all of an output channel's."""
    signed_scales: bool = True
    """A negative scale points the grid's longer side (-2^(b-1)) at a group's largest weight."""

    @model_validator(mode="after")
    def _check_group_size(self) -> Scheme:
        if self.group_size != -1 and (self.group_size < 32 or self.group_size % 32):
            raise ValueError(f"group_size is {self.group_size}: give -1 or a multiple of 32")
        return self


class Rtn(_Frozen):
    """Round to nearest on the initial grid."""

    name: Literal["rtn"] = "rtn"
    scale_init: ScaleInit = "minmax"


class SignRound(_Frozen):
    """SignRound (arXiv 2309.05516): rounding and clipping learned block by block."""

    name: Literal["signround"] = "signround"
    scale_init: ScaleInit = "minmax"
    iters: Annotated[int, Field(ge=1)] = 200
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Calibration rows per iteration."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Step of the rounding offsets; None: 1 / iters."""
    minmax_lr: Annotated[float, Field(gt=0)] | None = None
    """Step of the clipping factors; None: as lr."""


class Calibration(_Frozen):
    """Which text the algorithm sees."""

    source: str = "pile-10k"
    """A named data set, or a .txt, .jsonl or .parquet file."""
    rows: Annotated[int, Field(ge=1)] = 128
    seqlen: Annotated[int, Field(ge=8)] = 2048
    layout: Literal["truncate", "pack"] = "truncate"
    """truncate: a row is the start of a document of at least seqlen tokens; pack: documents are
    joined end to end and cut into rows."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class Recipe(_Frozen):
    """Everything that decides the bytes of the result, besides the base checkpoint."""

    scheme: Scheme = Scheme()
    algorithm: Annotated[Rtn | SignRound, Field(discriminator="name")] = SignRound()
    calibration: Calibration = Calibration()
    format: Format = "auto_round"
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest weight file, in units of 10^9 bytes."""

    @model_validator(mode="after")
    def _check_format_holds_bits(self) -> Recipe:
        if self.scheme.bits not in (2, 4, 8):
            raise ValueError(f"scheme.bits is {self.scheme.bits}: {self.format} stores 2, 4 or 8")
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def summary(self) -> str:
        """One line for people."""
        scheme, algorithm, text = self.scheme, self.algorithm, self.calibration
        group = "per channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
        line = f"{algorithm.name} W{scheme.bits} {group}, {self.format}"
        if isinstance(algorithm, SignRound):
            line += f", {algorithm.iters} iterations x {algorithm.batch_size} rows"
        if isinstance(algorithm, SignRound) or algorithm.scale_init == "importance":
            line += f", {text.rows} x {text.seqlen} tokens of {text.source}"
        return line
