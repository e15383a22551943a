from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.commands import Outcome, refusal

from nybble.report.acceptance_plot import DraftRates, acceptance_figure, write_acceptance_plot
from nybble.report.style import checkpoint_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Nybble = Callable[..., Outcome]

BASE = DraftRates("base", "greedy", (0.8, 0.6, 0.4), (0.01, 0.02, 0.03))
SAMPLED = DraftRates("base", "sampled", (0.7, 0.5, 0.3), (0.01, 0.02, 0.03))
W4 = DraftRates("w4", "greedy", (0.75, 0.5, 0.2))


def drawn(panels: dict[str, list[DraftRates]]) -> Figure:
    return acceptance_figure("MTP drafts accepted", "3 drafts a step", panels)


def shown_panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def test_a_line_is_a_checkpoint_and_a_way() -> None:
    (axes,) = shown_panels(drawn({"all classes": [BASE, SAMPLED, W4]}))
    lines = axes.get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[1, 2, 3]] * 3
    for line, rates in zip(lines, (BASE, SAMPLED, W4), strict=True):
        assert list(line.get_ydata()) == pytest.approx([100 * rate for rate in rates.rates])
    first, second, third = lines
    assert first.get_color() == second.get_color() == checkpoint_style(0).colour
    assert third.get_color() == checkpoint_style(1).colour
    assert len(axes.collections) == 2  # where errors are known


def test_a_way_is_a_kind_of_dashes(tmp_path: Path) -> None:
    def dashed(name: str, lines: list[DraftRates]) -> int:
        write_acceptance_plot(tmp_path / name, "t", "c", {"all": lines})
        return (tmp_path / name).read_text(encoding="utf-8").count("stroke-dasharray: 4,1.5")

    assert dashed("one.svg", [BASE, W4]) == 0
    assert dashed("two.svg", [BASE, W4, SAMPLED]) == 2  # the line, and in the legend


def test_the_axes_say_what_is_counted() -> None:
    (axes,) = shown_panels(drawn({"all classes": [BASE]}))
    assert axes.get_title(loc="left") == "all classes"
    assert axes.get_xlabel() == "draft"
    assert "%" in axes.get_ylabel()
    assert axes.get_ylim() == (0, 100)
    assert axes.get_xticks().tolist() == [1, 2, 3]


def test_the_legend_has_checkpoints_and_ways_once() -> None:
    figure = drawn({"code": [BASE, SAMPLED, W4], "prose": [BASE, SAMPLED, W4]})
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["base", "w4", "greedy", "sampled"]
    assert legend.get_title().get_text() == "MTP drafts accepted"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_there_is_a_panel_for_each_text(count: int) -> None:
    names = [f"class {number}" for number in range(count)]
    found = shown_panels(drawn({name: [BASE] for name in names}))
    assert [axes.get_title(loc="left") for axes in found] == names


def test_what_was_never_drafted_is_not_drawn(tmp_path: Path) -> None:
    nothing = DraftRates("w4", "on policy", (math.nan,) * 3, (math.nan,) * 3)
    (axes,) = shown_panels(drawn({"all": [BASE, nothing]}))
    assert np.isnan(np.asarray(axes.get_lines()[1].get_ydata())).all()
    write_acceptance_plot(tmp_path / "a.png", "t", "c", {"all": [nothing]})


def test_one_draft_that_never_fits_is_drawn(tmp_path: Path) -> None:
    lost = DraftRates("w2", "greedy", (0.0,), (math.nan,))
    (axes,) = shown_panels(drawn({"all": [lost]}))
    assert list(axes.get_lines()[0].get_ydata()) == [0.0]
    write_acceptance_plot(tmp_path / "a.png", "t", "c", {"all": [lost]})


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_the_same_rates_make_the_same_bytes(tmp_path: Path, name: str) -> None:
    panels = {"all": [BASE, W4]}
    write_acceptance_plot(tmp_path / name, "t", "c", panels)
    once = (tmp_path / name).read_bytes()
    write_acceptance_plot(tmp_path / name, "t", "c", panels)
    assert (tmp_path / name).read_bytes() == once
    write_acceptance_plot(tmp_path / name, "t", "c", {"all": [BASE]})
    assert (tmp_path / name).read_bytes() != once


def test_accept_draws_what_it_measured(
    nybble: Nybble, tiny_base: Path, rtn_result: Path, text_file: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "accept.svg"
    few = ("--text", f"words={text_file}", "--windows", 2, "--seqlen", 24, "--n", 2)
    outcome = nybble("accept", tiny_base, rtn_result, *few, "--plot", plot)
    assert outcome.code == 0, outcome.err
    content = plot.read_text(encoding="utf-8")
    for text in ("all classes", "greedy", "sampled", tiny_base.name, rtn_result.name):
        assert f"<!-- {text} -->" in content
    assert "on policy" not in content


def test_accept_refuses_a_figure_before_it_measures(
    nybble: Nybble, tiny_base: Path, tmp_path: Path
) -> None:
    outcome = nybble("accept", tiny_base, "--plot", tmp_path / "accept.pdf")
    assert "give a file that ends in .png or .svg" in refusal(outcome)
