from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Outcome, refusal
from typer.testing import CliRunner

from nybble.cli.app import app
from nybble.pipeline.quant_log import QuantLogRow, write_quant_log

Nybble = Callable[..., Outcome]

PREFIX = "model.layers.0"
GPTQ = QuantLogRow(
    module=f"{PREFIX}.mlp.up_proj",
    block=0,
    part="mlp",
    out_features=256,
    in_features=128,
    bits=4,
    group_size=128,
    algorithm="gptq",
    tokens=4096,
    rtn_output_error=0.008,
    output_error=0.002,
    sqnr_db=18.26,
    damping=0.01,
    damping_increases=1,
    dead_channels=3,
    too_few_tokens=False,
    block_loss_start=None,
    block_loss=None,
    best_iter=None,
    seconds=100.0,
    block_seconds=120.0,
)
DOWN = dataclasses.replace(GPTQ, module=f"{PREFIX}.mlp.down_proj", output_error=0.004, sqnr_db=16.0)
EXPERT = dataclasses.replace(
    GPTQ,
    module=f"{PREFIX}.mlp.experts.7.up_proj",
    part="experts",
    tokens=1500,
    output_error=0.01,
    bits=8,
)
STARVED = dataclasses.replace(
    EXPERT,
    module=f"{PREFIX}.mlp.experts.8.up_proj",
    tokens=12,
    output_error=None,
    rtn_output_error=None,
    too_few_tokens=True,
)
RTN = dataclasses.replace(
    GPTQ,
    algorithm="rtn",
    tokens=None,
    rtn_output_error=None,
    output_error=None,
    damping=None,
    damping_increases=None,
    dead_channels=None,
    seconds=None,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    def make(*rows: QuantLogRow) -> Path:
        folder = tmp_path / "made"
        folder.mkdir()
        write_quant_log(folder / "quant_log.csv", rows)
        return folder

    return make


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, nybble: Nybble) -> Callable[..., list[str]]:
    """The lines that ``log`` prints on a terminal of 80 columns, without their padding."""

    def run(*arguments: str | Path) -> list[str]:
        monkeypatch.setenv("COLUMNS", "80")
        outcome = nybble("log", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        return [" ".join(line.split()) for line in outcome.out.splitlines()]

    return run


def test_the_tables_of_a_calibrated_run(
    shown: Callable[..., list[str]], checkpoint: Callable[..., Path]
) -> None:
    lines = shown(checkpoint(GPTQ, DOWN, EXPERT, STARVED))
    assert lines == [
        "made: gptq, INT4 + INT8, 4 modules in 1 block, 2 min",
        "",
        "part modules bits error worst of RTN's SQNR dB worst",
        "mlp 2 4 0.003 0.004 38% 17.1 16.0",
        "experts 2 8 0.01 0.01 125% 18.3 18.3",
        "error: squared output error over squared output, by the inputs' second moments",
        "",
        "part too few tokens damping increases dead channels time",
        "mlp - 2 6 3 min",
        "experts 1 2 6 3 min",
        "",
        "3 with the largest output error error of RTN's SQNR dB tokens",
        f"{EXPERT.module} 0.01 125% 18.3 1,500",
        f"{DOWN.module} 0.004 50% 16.0 -",
        f"{GPTQ.module} 0.002 25% 18.3 -",
    ]


def test_what_was_not_measured_takes_no_place(
    shown: Callable[..., list[str]], checkpoint: Callable[..., Path]
) -> None:
    assert shown(checkpoint(RTN)) == [
        "made: rtn, INT4, 1 module in 1 block, 2 min",
        "",
        "part modules bits SQNR dB worst",
        "mlp 1 4 18.3 18.3",
        "",
        "1 with the lowest SQNR SQNR dB",
        f"{RTN.module} 18.3",
    ]


def test_at_most_ten_modules_are_shown(
    shown: Callable[..., list[str]], checkpoint: Callable[..., Path]
) -> None:
    rows = [
        dataclasses.replace(GPTQ, module=f"{PREFIX}.mlp.m{number:02}", output_error=number / 100)
        for number in range(12)
    ]
    named = [x.split()[0] for x in shown(checkpoint(*rows)) if x.startswith(PREFIX)]
    assert named == [f"{PREFIX}.mlp.m{number:02}" for number in range(11, 1, -1)]


def test_the_log_itself_may_be_given(
    shown: Callable[..., list[str]], checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(GPTQ)
    assert shown(folder) == shown(folder / "quant_log.csv")


def test_the_figure_is_drawn_on_demand(
    shown: Callable[..., list[str]], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lines = shown(checkpoint(GPTQ, DOWN), "--plot", tmp_path / "log.png")
    assert lines[-1] == f"The figure is in {tmp_path / 'log.png'}"
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(
    nybble: Nybble, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(GPTQ)
    assert "no folder or log" in refusal(nybble("log", tmp_path / "nothing"))
    assert "there is no quant_log.csv" in refusal(nybble("log", tmp_path))
    wrong = nybble("log", folder, "--plot", tmp_path / "log.pdf")
    assert "give a file that ends in .png or .svg" in refusal(wrong)
    assert wrong.out == ""
    (folder / "quant_log.csv").write_text("a,b\n1,2\n")
    assert "not a log of nybble quantize" in refusal(nybble("log", folder))


def test_the_help_names_the_log_and_the_figure() -> None:
    result = CliRunner().invoke(app, ["log", "--help"])
    assert result.exit_code == 0
    for words in ("CKPT", "quant_log.csv", "--plot", "FILE.png"):
        assert words in result.output
