"""What the user asks for, as one frozen, validated value. Unknown keys are errors."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

ScaleInit = Literal["minmax", "mse", "importance"]
Format = Literal["auto_round", "gptq", "compressed-tensors"]
Bits = Literal[2, 3, 4, 8]
Layout = Literal["truncate", "pack", "pad"]

DEFAULT_SOURCE = "pile-10k"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Override(_Frozen):
    """Another grid, or none, for some Linears of the decoder blocks."""

    match: str
    """Regular expression, searched for in a Linear's name; the first override that finds it wins.
    Linears that engines fuse (q/k/v, gate/up, in_proj_qkv/z, all experts) must agree."""
    keep: bool = False
    """Leave these as they are in the base."""
    bits: Bits | None = None
    group_size: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Override:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match {self.match!r} is no regular expression: {error}") from error
        given = self.bits is not None or self.group_size is not None
        if self.keep == given:
            raise ValueError("an override has either keep = true, or bits or group_size")
        if self.group_size is not None:
            _check_group_size(self.group_size)
        return self


class Scheme(_Frozen):
    """The integer grid of a quantized weight: symmetric, one scale per group of inputs."""

    bits: Bits = 4
    group_size: int = 128
    """Input channels that share one scale; -1: all of an output channel's."""
    signed_scales: bool = True
    """A negative scale points the grid's longer side (-2^(b-1)) at a group's largest weight."""
    lm_head_bits: Literal[4, 8] | None = None
    """Quantize the output head too; None: keep it."""
    mtp_bits: Literal[4, 8] | None = None
    """Quantize the MTP head's decoder layer too (never mtp.fc); None: keep it."""
    overrides: Annotated[tuple[Override, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _check(self) -> Scheme:
        _check_group_size(self.group_size)
        return self


def _check_group_size(group_size: int) -> None:
    if group_size != -1 and (group_size < 32 or group_size % 32):
        raise ValueError(f"group_size is {group_size}: give -1 or a multiple of 32")


class Rtn(_Frozen):
    """Round to nearest on the initial grid."""

    name: Literal["rtn"] = "rtn"
    scale_init: ScaleInit = "minmax"


class Gptq(_Frozen):
    """GPTQ (arXiv 2210.17323): each column's rounding error is made up for by the columns after."""

    name: Literal["gptq"] = "gptq"
    scale_init: ScaleInit = "importance"
    act_order: bool = True
    """Columns in the order of falling activation; scales stay those of the original groups, so
    no permutation reaches the file."""
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the mean diagonal that is added to the diagonal; doubled until it suffices."""
    true_sequential: bool = False
    """Gather each input anew after the Linears before it in the block were quantized."""


class SignRound(_Frozen):
    """SignRound (arXiv 2309.05516): rounding and clipping learned block by block."""

    name: Literal["signround"] = "signround"
    scale_init: ScaleInit = "minmax"
    iters: Annotated[int, Field(ge=0)] = 200
    """0: round to nearest."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Calibration rows per iteration."""
    lr: Annotated[float, Field(gt=0)] | None = None
    """Step of the rounding offsets; None: 1 / iters."""
    minmax_lr: Annotated[float, Field(gt=0)] | None = None
    """Step of the clipping factors; None: as lr."""


Algorithm = Rtn | Gptq | SignRound


class TextSource(_Frozen):
    """One source of a mix."""

    source: str
    """A named data set, ``hf:OWNER/NAME@COMMIT:SPLIT``, or a .txt, .jsonl or .parquet file."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its part of the rows, in proportion to the other weights; at least one row."""
    layout: Layout | None = None
    """None: the calibration's."""


class Calibration(_Frozen):
    """Which text the algorithm sees: of one source, or of a mix of several."""

    mix: Annotated[tuple[TextSource, ...], Field(strict=False)] = ()  # TOML has lists only
    """Several sources by weight; in the place of ``source``."""
    source: str | None = Field(
        default_factory=lambda given: None if given.get("mix") else DEFAULT_SOURCE
    )
    """What a ``TextSource`` names; None where there is a mix."""
    rows: Annotated[int, Field(ge=1, validate_default=True)] = 128
    seqlen: Annotated[int, Field(ge=8)] = 2048
    layout: Layout = "truncate"
    """truncate: a row is the start of a document of at least seqlen tokens; pack: documents are
    joined end to end and cut into rows; pad: a row is the start of any document, and where that is
    shorter than seqlen, padded on the right."""
    min_tokens: Annotated[int, Field(ge=1)] = 32
    """Layout pad: documents of fewer tokens are left out, unless they fill a row."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @field_validator("source")
    @classmethod
    def _check_source_or_mix(cls, source: str | None, info: ValidationInfo) -> str | None:
        mix = info.data.get("mix")
        if source is not None and mix:
            raise ValueError(
                f"there is also a mix of {', '.join(part.source for part in mix)}: "
                "give one of the two (calibration.mix=[] takes the mix out)"
            )
        if source is None and not mix:
            raise ValueError("give a source or a mix")
        return source

    @field_validator("rows")
    @classmethod
    def _check_a_row_for_each_source(cls, rows: int, info: ValidationInfo) -> int:
        sources = len(info.data.get("mix", ()))
        if rows < sources:
            raise ValueError(f"the mix has {sources} sources: give each at least one row")
        return rows

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The mix, or the one source, each with the layout that it is to have."""
        parts = self.mix if self.source is None else (TextSource(source=self.source),)
        return tuple(
            part.model_copy(update={"layout": part.layout or self.layout}) for part in parts
        )

    def summary(self) -> str:
        """A few words for people, like ``128 x 2048 tokens of pile-10k``.

        A mix's sources have their weights in parentheses; padded rows are ``up to`` their length.
        """
        parts = self.sources
        names = [part.source for part in parts]
        if len(parts) > 1:
            names = [f"{part.source} ({part.weight:g})" for part in parts]
        bound = "up to " if any(part.layout == "pad" for part in parts) else ""
        return f"{self.rows} x {bound}{self.seqlen} tokens of {' + '.join(names)}"


class Recipe(_Frozen):
    """Everything that decides the bytes of the result, besides the base checkpoint."""

    scheme: Scheme = Scheme()
    algorithm: Annotated[Algorithm, Field(discriminator="name")] = SignRound()
    calibration: Calibration = Calibration()
    format: Format = "auto_round"
    max_shard_gb: Annotated[float, Field(gt=0)] = 5.0
    """Largest weight file, in units of 10^9 bytes."""

    @property
    def trains(self) -> bool:
        """Whether rounding is learned, step by step."""
        return isinstance(self.algorithm, SignRound) and self.algorithm.iters > 0

    @property
    def needs_text(self) -> bool:
        """Whether the algorithm looks at calibration text at all."""
        algorithm = self.algorithm
        return self.trains or isinstance(algorithm, Gptq) or algorithm.scale_init == "importance"

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def summary(self) -> str:
        """One line for people."""
        scheme, algorithm = self.scheme, self.algorithm
        group = "per channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
        parts = [f"{algorithm.name} W{scheme.bits} {group}", self.format]
        parts += [f"lm_head W{scheme.lm_head_bits}"] if scheme.lm_head_bits else []
        parts += [f"MTP W{scheme.mtp_bits}"] if scheme.mtp_bits else []
        parts += [_override_text(override) for override in scheme.overrides]
        if isinstance(algorithm, SignRound):
            parts.append(f"{algorithm.iters} iterations x {algorithm.batch_size} rows")
        if self.needs_text:
            parts.append(self.calibration.summary())
        return ", ".join(parts)


def _override_text(override: Override) -> str:
    if override.keep:
        return f"{override.match} kept"
    bits = "" if override.bits is None else f" W{override.bits}"
    group = "" if override.group_size is None else f" group {override.group_size}"
    return f"{override.match}{bits}{group}"
