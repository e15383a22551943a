from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.commands import run_python

from nybble.core.errors import CheckpointError, OutputError, RecipeError
from nybble.report.plot import Point, points, write_plot
from nybble.report.quant_log import ModuleLog
from nybble.report.style import check_plot_file

MakeRow = Callable[..., ModuleLog]


@pytest.fixture
def rows(make_row: MakeRow) -> list[ModuleLog]:
    """Two blocks, one of each attention, with experts, an MTP layer and an output head."""
    modules = [
        ("model.layers.0.linear_attn.out_proj", 0, "gdn"),
        ("model.layers.1.self_attn.q_proj", 1, "attention"),
        ("model.layers.0.mlp.up_proj", 0, "mlp"),
        *((f"model.layers.1.mlp.experts.{i}.up_proj", 1, "experts") for i in range(4)),
        ("mtp.layers.0.mlp.up_proj", 2, "mtp"),
        ("lm_head", 3, "lm_head"),
    ]
    return [
        make_row(module=name, block=block, part=part, output_error=0.001 * (number + 1))
        for number, (name, block, part) in enumerate(modules)
    ]


def test_points_are_the_median_and_the_range_of_a_block(make_row: MakeRow) -> None:
    rows = [
        make_row(module=f"m{number}", block=block, output_error=error)
        for number, (block, error) in enumerate(
            [(5, 0.4), (2, 0.3), (2, 0.1), (2, 0.2), (7, 0.0), (8, None)]
        )
    ]
    assert points(rows, "output_error") == [Point(2, 0.2, 0.1, 0.3), Point(5, 0.4, 0.4, 0.4)]


def test_a_ratio_may_be_negative_but_not_infinite(make_row: MakeRow) -> None:
    rows = [make_row(sqnr_db=-1.0), make_row(block=1, sqnr_db=math.inf)]
    assert points(rows, "sqnr_db") == [Point(0, -1.0, -1.0, -1.0)]


def test_what_no_axis_can_hold_is_left_out(tmp_path: Path, make_row: MakeRow) -> None:
    sound = make_row(output_error=0.5)
    mad = [
        make_row(block=1, output_error=1e308, sqnr_db=1e308),
        make_row(block=2, rtn_output_error=5e-324, sqnr_db=-1e308),
    ]
    assert [point.block for point in points([sound, *mad], "output_error")] == [0, 2]
    assert [point.block for point in points([sound, *mad], "rtn_output_error")] == [0, 1]
    write_plot(tmp_path / "log.png", "tiny", [sound, *mad])


@pytest.mark.parametrize("name", ["log.png", "log.svg", "LOG.SVG"])
def test_the_same_rows_make_the_same_bytes(
    tmp_path: Path, rows: list[ModuleLog], name: str
) -> None:
    write_plot(tmp_path / name, "tiny: gptq, INT4", rows)
    once = (tmp_path / name).read_bytes()
    write_plot(tmp_path / name, "tiny: gptq, INT4", rows)
    assert (tmp_path / name).read_bytes() == once
    assert once.startswith(b"<?xml" if name.lower().endswith("svg") else b"\x89PNG")
    assert b"matplotlib.org" not in once
    write_plot(tmp_path / name, "tiny: gptq, INT4", rows[1:])
    assert (tmp_path / name).read_bytes() != once


def texts(svg: Path) -> list[str]:
    """What is written in a figure: letters are outlines, but a comment before them says what."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(svg, parser)
    return [(node.text or "").strip() for node in tree.iter() if node.tag is ElementTree.Comment]


def test_the_figure_says_what_it_shows(tmp_path: Path, rows: list[ModuleLog]) -> None:
    write_plot(tmp_path / "log.svg", "tiny: gptq, INT4", rows)
    found = texts(tmp_path / "log.svg")
    legend = {"out_proj", "q_proj", "up_proj", "experts.up_proj", "lm_head", "range over experts"}
    assert {*legend, "rounded to nearest", "tiny: gptq, INT4", "MTP", "head", "block"} <= set(found)
    assert "SQNR of the weight (dB)" in found
    assert any("relative output error" in text for text in found)


def test_there_is_no_error_panel_without_errors(tmp_path: Path, rows: list[ModuleLog]) -> None:
    bare = [replace(row, output_error=None, rtn_output_error=None) for row in rows]
    write_plot(tmp_path / "log.svg", "tiny: rtn, INT4", bare)
    found = texts(tmp_path / "log.svg")
    assert "SQNR of the weight (dB)" in found
    assert not any("output error" in text or "nearest" in text for text in found)


def test_signs_in_names_are_only_signs(tmp_path: Path, make_row: MakeRow) -> None:
    row = make_row(module="model.layers.0.mlp.$x_{$")
    write_plot(tmp_path / "log.svg", "$\\frac{1$ 模型 \x1b \udcff", [row])
    found = texts(tmp_path / "log.svg")
    assert "$x_{$" in found
    assert "$\\frac{1$ 模型 ? ?" in found


def test_many_decades_are_powers_of_ten(tmp_path: Path, make_row: MakeRow) -> None:
    few = [
        make_row(
            block=block, module=f"m{block}", output_error=0.001 * (1 + block), rtn_output_error=None
        )
        for block in range(4)
    ]
    write_plot(tmp_path / "few.svg", "few", few)
    assert {"0.001", "0.002"} <= set(texts(tmp_path / "few.svg"))
    write_plot(tmp_path / "many.svg", "many", [*few, make_row(block=9, output_error=1e-7)])
    assert {"10⁻³", "10⁻⁶"} <= set(texts(tmp_path / "many.svg"))


def test_nothing_to_draw_is_told(tmp_path: Path, make_row: MakeRow) -> None:
    with pytest.raises(CheckpointError, match="nothing to plot"):
        write_plot(tmp_path / "log.png", "exact", [make_row(output_error=0.0, sqnr_db=math.inf)])
    assert not list(tmp_path.iterdir())


def test_only_two_kinds_of_files_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"log.pdf: give a file that ends in .png or .svg"):
        check_plot_file(tmp_path / "log.pdf")


def test_a_place_that_cannot_be_written_is_an_output_error(
    tmp_path: Path, make_row: MakeRow
) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_plot(tmp_path / "nothing" / "log.png", "tiny", [make_row()])


def test_a_missing_matplotlib_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"matplotlib: pip install 'nybble\[plots\]'"):
        check_plot_file(Path("log.png"))


def test_the_users_own_style_is_left_alone(tmp_path: Path, make_row: MakeRow) -> None:
    import matplotlib

    write_plot(tmp_path / "plain.svg", "tiny", [make_row()])
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        write_plot(tmp_path / "styled.svg", "tiny", [make_row()])
        assert matplotlib.rcParams["font.size"] == 40
    assert (tmp_path / "styled.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()


def test_matplotlib_is_not_needed_to_read_a_log() -> None:
    code = "import sys, nybble.report.plot; assert 'matplotlib' not in sys.modules"
    assert run_python(["-c", code]).code == 0
