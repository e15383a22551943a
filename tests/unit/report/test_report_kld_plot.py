from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from support.commands import Outcome, refusal, run_python

from nybble.core.errors import OutputError, RecipeError
from nybble.report.kld_curves import (
    Array,
    Divergence,
    Floor,
    by_depth,
    front,
    histogram_bins,
    mean_by_window,
    quantiles,
    shares,
)
from nybble.report.kld_plot import Heading, kld_figure, write_kld_plot
from nybble.report.labels import NamedPoint, label_points
from nybble.report.style import checkpoint_style, names_of, short, without_shared_start

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Nybble = Callable[..., Outcome]

HEADING = Heading("KL divergence from base", "80 positions: 4 windows; float32 on cpu")
FLOORS = [Floor("in bfloat16", 0.01, 0.002, 0.05), Floor("row by row", 1e-9, 1e-10, 1e-8)]


def divergence(
    level: float, size: float = 18.0, name: str = "w4", shape: tuple[int, int] = (4, 20)
) -> Divergence:
    """Log-normal around ``level``; ``size`` in GB."""
    noise = np.random.default_rng(0).normal(size=shape)
    return Divergence(name, int(size * 1e9), level * np.exp(noise))


def of(values: Sequence[Sequence[float]]) -> Divergence:
    return Divergence("some", 10**9, np.array(values, dtype=np.float64))


def panels(figure: Figure) -> list[Axes]:
    """Histogram, quantiles, depth, size."""
    assert len(figure.axes) == 4
    return figure.axes


def legend(figure: Figure) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def written(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def lines_of(axes: Axes, number: int) -> list[tuple[Array, Array]]:
    """What is drawn in the colour of a figure's checkpoint of that number."""
    colour = checkpoint_style(number).colour
    return [
        (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
        for line in axes.get_lines()
        if line.get_color() == colour
    ]


# Numbers


def test_errors_are_those_of_the_windows_means() -> None:
    windows = [[1.0, 3.0], [2.0, 6.0], [5.0, 1.0]]
    means = [mean(window) for window in windows]
    found = mean_by_window(np.array(windows))
    assert found == pytest.approx((mean(means), stdev(means) / math.sqrt(3)))
    assert of(windows).mean == found


def test_one_window_has_no_error() -> None:
    found, error = mean_by_window(np.array([[1.0, 3.0]]))
    assert found == 2.0
    assert math.isnan(error)


def test_the_lowest_bin_holds_all_below_it_and_the_highest_the_largest() -> None:
    one = of([[0.0, -1e-17, 1e-9, 0.5], [1.0, 2.0, 3.0, math.nan]])
    bins = np.array([0.1, 1.0, 3.0])
    assert shares(one, bins).tolist() == [50.0, 37.5]


def test_bins_span_all_checkpoints_and_no_rounding() -> None:
    low = np.append(np.geomspace(1e-3, 1e-2, 999), 1e-17).reshape(4, 250)
    bins = histogram_bins([Divergence("a", 1, low), divergence(1.0)])
    assert bins is not None
    assert 1e-4 < bins[0] < 2e-3
    assert bins[-1] == divergence(1.0).kld.max()
    ratios = bins[1:] / bins[:-1]
    assert ratios == pytest.approx(ratios[0])


def test_equal_values_have_bins_too() -> None:
    bins = histogram_bins([of([[0.5, 0.5]])])
    assert bins is not None
    assert bins[0] < 0.5 < bins[-1]
    assert shares(of([[0.5, 0.5]]), bins).sum() == 100


def test_there_are_no_bins_without_a_value_above_zero() -> None:
    assert histogram_bins([of([[0.0, -1e-18, math.nan]])]) is None


def test_quantiles_are_numpys_and_what_is_unknown_counts_as_largest() -> None:
    at = np.array([0.0, 0.25, 0.6, 1.0])
    values = [[3.0, 1.0, 2.0, 7.0, 5.0]]
    assert quantiles(of(values), at) == pytest.approx(np.quantile(values, at))
    found = quantiles(of([[1.0, math.inf, 2.0, math.nan]]), np.array([0.0, 1 / 3, 2 / 3, 1.0]))
    assert found[:2] == pytest.approx([1.0, 2.0])
    assert np.isnan(found[2:]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 20, 2047])
def test_stretches_by_depth_hold_each_position_once(count: int) -> None:
    kld = np.arange(1.0, count + 1)[None]  # at each position: the tokens that were given
    depths = by_depth(Divergence("a", 1, kld))
    assert depths.means.tolist() == depths.tokens.tolist()
    assert depths.tokens[0] == 1
    edges = [1]
    for middle in depths.tokens:
        edges.append(int(2 * middle - edges[-1]) + 1)
    assert edges[-1] == count + 1
    assert all(later > earlier for earlier, later in pairwise(edges))
    assert len(depths.tokens) <= 2 * math.log2(count) + 1


def test_depths_have_errors_by_window() -> None:
    depths = by_depth(of([[1.0, 4.0], [3.0, 4.0]]))
    assert depths.means.tolist() == [2.0, 4.0]
    assert depths.errors.tolist() == [1.0, 0.0]


def test_the_front_is_what_nothing_smaller_beats() -> None:
    points = [(18.0, 0.05), (18.0, 0.03), (12.0, 1.0), (37.0, 0.001), (20.0, 0.03), (14.0, 2.0)]
    assert front(points) == [(12.0, 1.0), (18.0, 0.03), (37.0, 0.001)]


# Figures


def test_every_panel_has_its_axes() -> None:
    histogram, curves, depth, size = panels(kld_figure(HEADING, [divergence(0.1)], []))
    assert histogram.get_xscale() == "log"
    assert "share of positions (%)" in histogram.get_ylabel()
    assert [axes.get_yscale() for axes in (curves, depth, size)] == ["log"] * 3
    assert depth.get_xscale() == "log"
    assert "GB" in size.get_xlabel()
    for axes in (histogram, curves, depth, size):
        measured = axes.get_xlabel() if axes is histogram else axes.get_ylabel()
        assert "KL divergence (nats)" in measured


def test_what_is_drawn_is_what_was_measured() -> None:
    found = [divergence(0.02, 37.0, "w8"), divergence(0.5, 18.0, "w4")]
    histogram, curves, depth, size = panels(kld_figure(HEADING, found, FLOORS))
    steps: list[Any] = list(histogram.patches)
    assert len(steps) == 4  # an outline and an area for each
    assert [patch.get_data().values.sum() for patch in steps] == pytest.approx([100] * 4)
    for number, one in enumerate(found):
        (_, curve), (_, marked) = lines_of(curves, number)
        assert curve[-1] == pytest.approx(np.quantile(one.kld, 1 - 1 / 80))
        assert marked.tolist() == pytest.approx(np.quantile(one.kld, [0.5, 0.9, 0.95]).tolist())
        ((tokens, means),) = lines_of(depth, number)
        assert means[0] == pytest.approx(one.kld[:, 0].mean())
        assert tokens.tolist() == by_depth(one).tokens.tolist()
        ((sizes, values),) = lines_of(size, number)
        assert sizes.tolist() == [one.weight_bytes / 1e9]
        assert values.tolist() == pytest.approx([one.kld.mean()])
    assert len(depth.collections) == 2  # bands of errors


def test_the_legend_names_means_errors_and_floors() -> None:
    found = [divergence(0.008, name="w8"), divergence(0.5, name="w4")]
    figure = kld_figure(HEADING, found, FLOORS)
    value, error = found[1].mean
    w8, w4, bfloat16, one_by_one = legend(figure)
    assert w8.startswith("w8: ")
    assert w8.endswith(", below 2x floor")
    assert w4 == f"w4: {value:.4g} +- {error:.2g}"
    assert bfloat16 == "floor, base in bfloat16: 0.01"
    assert one_by_one == "floor, base row by row: 1e-09, too low to draw"
    assert figure.legends[0].get_title().get_text() == HEADING.title


def test_a_floor_is_a_line_where_it_is_near() -> None:
    *_, depth, size = panels(kld_figure(HEADING, [divergence(0.1)], FLOORS))
    for axes in (depth, size):
        heights = [line.get_ydata() for line in axes.get_lines() if line.get_color() == "#333333"]
        assert [list(height) for height in heights] == [[0.01, 0.01]]
        assert axes.get_ylim()[0] < 0.01


def test_checkpoints_that_cannot_be_drawn_stand_in_the_legend() -> None:
    zero, broken = of([[0.0, 0.0], [0.0, 0.0]]), of([[math.nan, 1.0], [math.inf, 2.0]])
    found = [
        divergence(0.1),
        replace(zero, name="copy"),
        replace(broken, name="broken"),
    ]
    figure = kld_figure(HEADING, found, [])
    assert legend(figure)[1:] == ["copy: 0 +- 0", "broken: not a number"]
    histogram, _, _, size = panels(figure)
    assert len(histogram.patches) == 4  # of all but the copy
    assert len(lines_of(size, 0)) == 1
    assert lines_of(size, 1) == lines_of(size, 2) == []
    assert written(size) == ["w4"]


@pytest.mark.parametrize("kld", [np.zeros((2, 3)), np.full((2, 3), np.nan), np.full((1, 1), -1e-9)])
def test_nothing_above_zero_is_said_in_every_panel(tmp_path: Path, kld: Array) -> None:
    found = [Divergence("copy", 10**9, kld)]
    assert all(
        written(axes) == ["nothing above zero"] for axes in panels(kld_figure(HEADING, found, []))
    )
    write_kld_plot(tmp_path / "kld.png", HEADING, found, FLOORS)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (2, 1)])
def test_one_window_or_one_position_is_enough(tmp_path: Path, shape: tuple[int, int]) -> None:
    one = divergence(0.1, shape=shape)
    figure = kld_figure(HEADING, [one], FLOORS)
    assert ("+-" in legend(figure)[0]) == (shape[0] > 1)
    ((_, values),) = lines_of(panels(figure)[3], 0)
    assert values.tolist() == pytest.approx([one.kld.mean()])
    write_kld_plot(tmp_path / "kld.png", HEADING, [one], FLOORS)


def test_sizes_below_a_gigabyte_are_in_megabytes() -> None:
    size = panels(kld_figure(HEADING, [divergence(0.1, size=0.006)], []))[3]
    assert "MB" in size.get_xlabel()
    assert lines_of(size, 0)[0][0].tolist() == [6.0]


def test_names_stand_free_of_each_other_and_inside() -> None:
    from matplotlib.text import Text

    found = [divergence(0.1 + 0.002 * i, 18 + 0.05 * i, f"checkpoint-w4-{i}") for i in range(7)]
    figure = kld_figure(HEADING, found, FLOORS)
    figure.draw_without_rendering()
    size = panels(figure)[3]
    assert set(written(size)) == set("0123456")
    room = size.get_window_extent()
    words = [Text.get_window_extent(label) for label in size.texts]  # without their leading lines
    assert not any(one.overlaps(other) for one, other in combinations(words, 2))
    assert all(room.x0 <= box.x0 and box.x1 <= room.x1 for box in words)
    assert all(room.y0 <= box.y0 and box.y1 <= room.y1 for box in words)
    line = size.transData.transform((18, FLOORS[0].mean))[1]
    assert not any(box.y0 < line < box.y1 for box in words)


def test_a_name_without_room_is_left_out() -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(2, 2)).subplots()
    points = [NamedPoint(name, 0.5, 0.5, 0.5, 0.5) for name in ("a", "w" * 60)]
    assert [label.get_text() for label in label_points(axes, points)] == ["a"]


# Files


@pytest.mark.parametrize("name", ["kld.png", "kld.svg"])
def test_the_same_divergences_make_the_same_bytes(tmp_path: Path, name: str) -> None:
    found = [divergence(0.1, 18.0, "w4"), divergence(0.01, 37.0, "$w_{8")]
    write_kld_plot(tmp_path / name, HEADING, found, FLOORS)
    once = (tmp_path / name).read_bytes()
    write_kld_plot(tmp_path / name, HEADING, found, FLOORS)
    assert (tmp_path / name).read_bytes() == once
    assert once.startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
    write_kld_plot(tmp_path / name, HEADING, found[:1], FLOORS)
    assert (tmp_path / name).read_bytes() != once


def test_any_name_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "kld.svg"
    name = "模型 $\\frac{1$ \x1b \udcff " + "w" * 90
    with warnings.catch_warnings(action="error"):
        write_kld_plot(path, replace(HEADING, title=name), [divergence(0.1, name=name)], [])
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(path, parser)
    said = [(node.text or "").strip() for node in tree.iter() if node.tag is ElementTree.Comment]
    assert any(text.startswith("模型 $\\frac{1$ ? ? www") and "…" in text for text in said)


def test_long_names_keep_both_ends() -> None:
    assert short("a" * 44) == "a" * 44
    assert short("abcdefgh", 5) == "ab…gh"
    assert short("abcdefgh", 6) == "abc…gh"


def test_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert names_of(["a/w4", "b/w8/"]) == ["w4", "w8"]
    assert names_of(["a/w4", "b/w4"]) == ["a/w4", "b/w4"]
    assert names_of([str(tmp_path / "x" / "..")]) == [tmp_path.name]


def test_names_in_a_panel_are_what_they_do_not_share() -> None:
    names = ["Qwen3.6-27B-W4A16-gptq", "Qwen3.6-27B-W4A16-rtn", "Qwen3.6-27B-W8A16"]
    assert without_shared_start(names) == ["W4A16-gptq", "W4A16-rtn", "W8A16"]
    assert without_shared_start(["tiny", "tiny-w4"]) == ["tiny", "tiny-w4"]
    assert without_shared_start(["w4-a"]) == ["w4-a"]
    assert without_shared_start(["w-", "w-x"]) == ["w-", "x"]


def test_many_checkpoints_differ() -> None:
    looks = [checkpoint_style(number) for number in range(63)]
    assert len(set(looks)) == 63
    assert len({look.colour for look in looks[:7]}) == len({look.marker for look in looks[:7]}) == 7


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        write_kld_plot(tmp_path / "nothing" / "kld.png", HEADING, [divergence(0.1)], [])


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"kld.pdf: give a file that ends in .png or .svg"):
        write_kld_plot(tmp_path / "kld.pdf", HEADING, [divergence(0.1)], [])


def test_matplotlib_is_not_needed_without_a_figure() -> None:
    code = (
        "import sys, nybble.report.kld_plot, nybble.report.acceptance_plot; "
        "assert 'matplotlib' not in sys.modules"
    )
    assert run_python(["-c", code]).code == 0


# The option


def test_kld_draws_what_it_measured(
    nybble: Nybble, tiny_base: Path, rtn_result: Path, text_file: Path, tmp_path: Path
) -> None:
    plot, json_file = tmp_path / "kld.png", tmp_path / "kld.json"
    few = ("--text", text_file, "--windows", 2, "--seqlen", 24, "--no-noise")
    outcome = nybble("kld", tiny_base, rtn_result, *few, "--plot", plot, "--json", json_file)
    assert outcome.code == 0, outcome.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"The figure is in {plot}" in outcome.out.replace("\n", "")
    assert '"scores"' not in json_file.read_text()


def test_kld_refuses_a_figure_before_it_measures(
    nybble: Nybble, tiny_base: Path, tmp_path: Path
) -> None:
    named = nybble("kld", tiny_base, tiny_base, "--plot", tmp_path / "kld.pdf")
    assert "give a file that ends in .png or .svg" in refusal(named)
    bare = nybble("kld", tiny_base, "--plot", tmp_path / "kld.png")
    assert refusal(bare) == "--plot draws checkpoints, and none was given"
