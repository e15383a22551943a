"""quant_log.csv: one row per quantized module."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nybble.core.atomic import write_bytes_atomic


@dataclass(frozen=True)
class BlockLog:
    """What is known of a block as a whole. None: not measured."""

    seconds: float
    loss: float | None = None
    """Mean squared error of the finished block's output over all calibration rows."""
    loss_start: float | None = None
    """The same in the first training batch, before training."""
    best_iter: int | None = None


@dataclass(frozen=True)
class QuantLogRow:
    """How one module fared. Empty columns were not measured by the algorithm used."""

    module: str
    block: int
    part: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    algorithm: str
    tokens: int | None
    """Calibration tokens that reached the module."""
    rtn_output_error: float | None
    """Expected squared output error over squared output, if it were rounded to nearest."""
    output_error: float | None
    """The same as it is: by the inputs' second moments (gptq), else as if uncorrelated."""
    sqnr_db: float
    damping: float | None
    """Share of the mean diagonal added to the Hessian, after increases."""
    damping_increases: int | None
    dead_channels: int | None
    """Input channels that were zero on all calibration tokens."""
    too_few_tokens: bool
    """An expert that saw too few tokens to be calibrated well; gptq rounds it to nearest."""
    block_loss_start: float | None
    """Mean squared error of the block's output in the first training batch, before training."""
    block_loss: float | None
    """Mean squared error of the finished block's output over all calibration rows."""
    best_iter: int | None
    seconds: float | None
    """Of this module alone, where modules are done one by one."""
    block_seconds: float


def write_quant_log(path: Path, rows: Sequence[QuantLogRow]) -> None:
    """Writes all rows; raises OutputError if the folder cannot be written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(QuantLogRow)])
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _cell(v) for k, v in asdict(row).items()})
    write_bytes_atomic(path, text.getvalue().encode())


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6g}" if isinstance(value, float) else value
