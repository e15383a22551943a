"""quant_log.csv read back: how each module fared, as far as reports need it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from nybble.core.errors import CheckpointError

FILE_NAME = "quant_log.csv"
_LARGEST = 2**63
_EXPERTS = "experts"


@dataclass(frozen=True)
class ModuleLog:
    """One row. None: not measured by the algorithm used."""

    module: str
    block: int
    part: str
    bits: int
    algorithm: str
    tokens: int | None
    """Calibration tokens that reached the module."""
    rtn_output_error: float | None
    """Squared output error over squared output, if it were rounded to nearest."""
    output_error: float | None
    """The same as it is."""
    sqnr_db: float
    """Infinite for a weight that its codes hold exactly."""
    damping_increases: int | None
    dead_channels: int | None
    """Input channels that were zero on all calibration tokens."""
    too_few_tokens: bool
    """An expert that saw too few tokens to be calibrated."""
    seconds: float | None
    """Of this module alone."""
    block_seconds: float

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one of many routed experts."""
        return self.part == _EXPERTS

    @property
    def error_ratio(self) -> float | None:
        """Output error over that of rounding to nearest: below 1 is better."""
        if self.output_error is None or not self.rtn_output_error:
            return None
        return self.output_error / self.rtn_output_error


COLUMNS = tuple(field.name for field in fields(ModuleLog))
"""What a log must have; further columns are not looked at."""


def log_file(checkpoint: Path) -> Path:
    """The log of a checkpoint's folder, or the log itself if that is what was given.

    Raises CheckpointError if there is none, or the folder may not be read.
    """
    try:
        if not checkpoint.exists():
            raise CheckpointError(f"there is no folder or log {checkpoint}")
        path = checkpoint / FILE_NAME if checkpoint.is_dir() else checkpoint
        if not path.exists():
            raise CheckpointError(
                f"there is no {FILE_NAME} in {checkpoint}: give a folder that nybble quantize wrote"
            )
    except OSError as error:
        raise CheckpointError(f"cannot read {checkpoint}: {error.strerror or error}") from error
    return path


def read_quant_log(path: Path) -> list[ModuleLog]:
    """All rows, at least one, in the file's order.

    Raises CheckpointError, with the line, for a file that cannot be read, is not such a log, or
    was damaged.
    """
    rows: dict[str, ModuleLog] = {}
    try:
        # Strict: a quote that is never closed would swallow the rest of the file.
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            _refuse_foreign(path, header)
            for cells in reader:
                where = f"{path}: line {reader.line_num}"
                row = _module_log(where, header, cells)
                if row.module in rows:
                    raise CheckpointError(f"{where}: {row.module} is there a second time")
                rows[row.module] = row
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a log of nybble quantize: {error}") from error
    if not rows:
        raise CheckpointError(f"{path} has no rows: nothing was quantized, or it was cut off")
    return list(rows.values())


def _refuse_foreign(path: Path, header: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{path} is not a log of nybble quantize: no column {shown}")


def _module_log(where: str, header: list[str], cells: list[str]) -> ModuleLog:
    if len(cells) != len(header):
        raise CheckpointError(f"{where}: {len(cells)} cells, the header has {len(header)}")
    row = _Cells(where, dict(zip(header, cells, strict=True)))
    return ModuleLog(
        module=row.name("module"),
        block=row.count("block"),
        part=row.name("part"),
        bits=row.count("bits"),
        algorithm=row.name("algorithm"),
        tokens=row.count("tokens") if row.has("tokens") else None,
        rtn_output_error=row.measure("rtn_output_error") if row.has("rtn_output_error") else None,
        output_error=row.measure("output_error") if row.has("output_error") else None,
        sqnr_db=row.decibels("sqnr_db"),
        damping_increases=row.count("damping_increases") if row.has("damping_increases") else None,
        dead_channels=row.count("dead_channels") if row.has("dead_channels") else None,
        too_few_tokens=row.yes("too_few_tokens"),
        seconds=row.measure("seconds") if row.has("seconds") else None,
        block_seconds=row.measure("block_seconds"),
    )


@dataclass(frozen=True)
class _Cells:
    """One line's cells by column; every reader raises CheckpointError for another value."""

    where: str
    values: Mapping[str, str]

    def has(self, column: str) -> bool:
        return self.values[column] != ""

    def name(self, column: str) -> str:
        value = self.values[column]
        if not value or not value.isprintable():  # it is shown on terminals
            raise self._refused(column, "a name")
        return value

    def count(self, column: str) -> int:
        value = self.values[column]
        if not (value.isascii() and value.isdigit() and len(value) < 20 and int(value) < _LARGEST):
            raise self._refused(column, "a whole number")
        return int(value)

    def yes(self, column: str) -> bool:
        if self.values[column] not in ("0", "1"):
            raise self._refused(column, "0 or 1")
        return self.values[column] == "1"

    def measure(self, column: str) -> float:
        value = self._number(column)
        if not 0 <= value < math.inf:
            raise self._refused(column, "a finite number from 0 up")
        return value

    def decibels(self, column: str) -> float:
        value = self._number(column)
        if not value > -math.inf:
            raise self._refused(column, "a number of decibels")
        return value

    def _number(self, column: str) -> float:
        try:
            return float(self.values[column])
        except ValueError:
            raise self._refused(column, "a number") from None

    def _refused(self, column: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: {column} is {self.values[column][:40]!r}, not {wanted}"
        )
