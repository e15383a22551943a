from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from nybble.core.errors import OutputError
from nybble.pipeline.quant_log import QuantLogRow, write_quant_log

ROW = QuantLogRow(
    module="model.layers.0.mlp.up_proj",
    block=0,
    part="mlp",
    out_features=256,
    in_features=128,
    bits=4,
    group_size=128,
    algorithm="rtn",
    tokens=4096,
    rtn_output_error=None,
    output_error=None,
    sqnr_db=18.25,
    damping=0.01,
    damping_increases=0,
    dead_channels=3,
    too_few_tokens=False,
    block_loss_start=None,
    block_loss=1.5e-7,
    best_iter=None,
    seconds=0.0625,
    block_seconds=0.125,
)


def test_rows_are_read_back(tmp_path: Path) -> None:
    write_quant_log(tmp_path / "log.csv", [ROW, ROW])
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0]["module"] == ROW.module
    assert float(rows[0]["sqnr_db"]) == 18.25
    assert float(rows[0]["block_loss"]) == 1.5e-7
    assert rows[0]["output_error"] == rows[0]["best_iter"] == ""
    assert (rows[0]["tokens"], rows[0]["damping_increases"], rows[0]["dead_channels"]) == (
        "4096",
        "0",
        "3",
    )


@pytest.mark.parametrize("value", [False, True])
def test_yes_and_no_are_one_and_zero(tmp_path: Path, value: bool) -> None:
    write_quant_log(tmp_path / "log.csv", [dataclasses.replace(ROW, too_few_tokens=value)])
    with (tmp_path / "log.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["too_few_tokens"] == str(int(value))


def test_an_exact_weight_has_an_infinite_ratio(tmp_path: Path) -> None:
    write_quant_log(tmp_path / "log.csv", [dataclasses.replace(ROW, sqnr_db=math.inf)])
    with (tmp_path / "log.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["sqnr_db"]) == math.inf


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_quant_log(tmp_path / "nothing" / "log.csv", [ROW])
