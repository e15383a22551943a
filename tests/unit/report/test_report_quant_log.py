from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from nybble.core.errors import CheckpointError
from nybble.pipeline.quant_log import QuantLogRow, write_quant_log
from nybble.report.quant_log import COLUMNS, ModuleLog, log_file, read_quant_log

WRITTEN = QuantLogRow(
    module="model.layers.0.mlp.up_proj",
    block=0,
    part="mlp",
    out_features=256,
    in_features=128,
    bits=4,
    group_size=128,
    algorithm="gptq",
    tokens=None,
    rtn_output_error=None,
    output_error=1.5e-7,
    sqnr_db=math.inf,
    damping=0.01,
    damping_increases=2,
    dead_channels=3,
    too_few_tokens=True,
    block_loss_start=None,
    block_loss=None,
    best_iter=None,
    seconds=None,
    block_seconds=0.125,
)


def text_of(**cells: str) -> str:
    """A log of one row, with these cells put in."""
    sound = {
        **dict.fromkeys(COLUMNS, "0"),
        "module": "a.0.b.c",
        "part": "mlp",
        "algorithm": "rtn",
        **cells,
    }
    return ",".join(sound) + "\n" + ",".join(sound.values()) + "\n"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[str | bytes], str]:
    """Why a file is refused, without its path."""

    def read(data: str | bytes) -> str:
        path = tmp_path / "log.csv"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        with pytest.raises(CheckpointError) as caught:
            read_quant_log(path)
        message = str(caught.value)
        assert "\n" not in message
        assert str(path) in message
        return message.replace(str(path), "LOG")

    return read


def test_what_quantize_writes_is_read_back(tmp_path: Path) -> None:
    write_quant_log(tmp_path / "log.csv", [WRITTEN])
    (row,) = read_quant_log(tmp_path / "log.csv")
    assert asdict(row) == {name: asdict(WRITTEN)[name] for name in COLUMNS}


def test_every_column_is_one_that_quantize_writes() -> None:
    assert {field.name for field in fields(QuantLogRow)} >= set(COLUMNS)


def test_a_folder_stands_for_the_log_in_it(tmp_path: Path) -> None:
    file = tmp_path / "quant_log.csv"
    file.touch()
    assert log_file(tmp_path) == log_file(file) == file


def test_a_missing_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no quant_log.csv in .* quantize wrote"):
        log_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder or log .*nothing"):
        log_file(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"cannot read .*name too long"):
        log_file(tmp_path / ("x" * 300))


def test_a_log_that_is_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        read_quant_log(tmp_path)


def test_a_foreign_file_lacks_columns(refused: Callable[..., str]) -> None:
    assert refused("module,loss\na,1\n") == (
        "LOG is not a log of nybble quantize: no column block, part, bits, ..."
    )
    assert refused("").startswith("LOG is not a log of nybble quantize: no column module")
    one = text_of().replace("sqnr_db", "snr")
    assert refused(one) == "LOG is not a log of nybble quantize: no column sqnr_db"


def test_other_bytes_are_not_a_log(refused: Callable[..., str]) -> None:
    assert "utf-8" in refused(b"\x89PNG\xff\xfe")
    assert "unexpected end of data" in refused(text_of(module='"a'))


def test_a_log_that_was_cut_off_is_told(refused: Callable[..., str]) -> None:
    header, row = text_of().splitlines()
    assert refused(header + "\n").startswith("LOG has no rows")
    assert refused(f"{header}\n{row}\na.0.b.d,0,ml\n") == (
        f"LOG: line 3: 3 cells, the header has {len(COLUMNS)}"
    )


def test_a_module_is_there_once(refused: Callable[..., str]) -> None:
    text = text_of()
    assert refused(text + text.splitlines()[1]) == "LOG: line 3: a.0.b.c is there a second time"


@pytest.mark.parametrize(
    ("column", "cell", "wanted"),
    [
        ("module", "", "a name"),
        ("module", "a\x1b[31m", "a name"),
        ("block", "", "a whole number"),
        ("block", "-1", "a whole number"),
        ("bits", "4.0", "a whole number"),
        ("tokens", "9" * 30, "a whole number"),
        ("block", "\u00b2", "a whole number"),
        ("sqnr_db", "", "a number"),
        ("sqnr_db", "loud", "a number"),
        ("sqnr_db", "nan", "a number of decibels"),
        ("sqnr_db", "-inf", "a number of decibels"),
        ("output_error", "nan", "a finite number from 0 up"),
        ("output_error", "inf", "a finite number from 0 up"),
        ("rtn_output_error", "-1e-3", "a finite number from 0 up"),
        ("too_few_tokens", "True", "0 or 1"),
        ("block_seconds", "", "a number"),
    ],
)
def test_a_damaged_cell_is_named(
    refused: Callable[..., str], column: str, cell: str, wanted: str
) -> None:
    assert refused(text_of(**{column: cell})) == (
        f"LOG: line 2: {column} is {cell[:40]!r}, not {wanted}"
    )


def test_the_error_is_compared_where_both_are_known(make_row: Callable[..., ModuleLog]) -> None:
    assert make_row().error_ratio == 0.25
    assert make_row(output_error=None).error_ratio is None
    assert make_row(rtn_output_error=None).error_ratio is None
    assert make_row(output_error=0.0, rtn_output_error=0.0).error_ratio is None
