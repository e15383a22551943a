"""quant_log.csv: one row per quantized module."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nybble.core.atomic import write_bytes_atomic


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
    relative_output_error: float | None
    """Expected squared output error / squared output, inputs taken as uncorrelated."""
    sqnr_db: float
    block_loss_start: float | None
    """Mean squared error of the block's output in the first training batch, before training."""
    block_loss: float | None
    """Mean squared error of the finished block's output over all calibration rows."""
    best_iter: int | None
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
    return f"{value:.6g}" if isinstance(value, float) else value
