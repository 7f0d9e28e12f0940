"""Drawings of a comparison: what lies where, on the page's charts and in matplotlib's files."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_logs import make_log

from deft_tvm.compare import drawing, plot
from deft_tvm.compare.comparison import Comparison, Row, compare
from deft_tvm.compare.sources import Source
from deft_tvm.errors import InputError
from deft_tvm.figures import pyplot


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("logs")
    paths = (make_log(folder / "A", "A"), make_log(folder / r"B $\frac$", "B"))
    return compare(*map(Source.read, paths))


@pytest.fixture
def figure(monkeypatch):
    """Calls `plot`, and gives its axes instead of writing them."""
    kept = []
    monkeypatch.setattr(plot, "save", lambda figure, path: kept.append(figure))

    def axes_of(found: list[Comparison]) -> list:
        plot.plot(found, "unwritten.svg")
        return kept[-1].axes

    yield axes_of
    pyplot.close("all")


def row_of(found: Comparison, kernel: str) -> Row:
    return next(row for row in found.rows if row.subject.kernel == kernel)


def test_the_axis_holds_every_interval_with_one_in_the_middle(found) -> None:
    axis = drawing.Axis.of(found)
    assert axis.at(1) == 50
    ends = [axis.at(end) for row in found.measured for end in (row.ratio.low, row.ratio.high)]
    assert 0 <= min(ends) < 50 < max(ends) <= 100
    assert {min(ends), 100 - max(ends)} & {0.0}


def test_without_a_row_in_both_the_axis_is_the_narrowest(found) -> None:
    assert drawing.Axis.of(replace(found, rows=())).most == drawing.NARROWEST


def test_a_curve_falls_from_its_first_to_its_best(found) -> None:
    trials, minutes = drawing.charts(row_of(found, "left"))
    (curve,) = trials.curves
    assert (trials.first, trials.last) == ("1", "8")
    assert curve.path.startswith(f"M{drawing.LEFT}.0 {drawing.TOP}.0")
    assert curve.end == (drawing.RIGHT, drawing.BOTTOM)
    heights = [float(each) for each in re.findall(r"V([\d.]+)", curve.path)]
    assert heights == sorted(heights), "down is larger"
    assert drawing.LEFT < curve.near[0] < drawing.RIGHT
    assert float(minutes.last) > float(minutes.first)


def test_the_lower_curve_is_of_the_log_with_the_lower_times(found) -> None:
    chart, _ = drawing.charts(row_of(found, "shrank"))
    ends = {curve.letter: curve.end[1] for curve in chart.curves}
    assert ends["A"] < ends["B"] == drawing.BOTTOM
    assert [height for height, _ in chart.ticks] == [136, 75, 14]


def test_a_search_of_one_trial_is_a_point(found) -> None:
    row = row_of(found, "left")
    one = replace(row, before=replace(row.before, trials=row.before.trials[:1]))
    for chart in drawing.charts(one):
        assert chart.first == chart.last
        assert chart.curves[0].near == chart.curves[0].end == (drawing.RIGHT, drawing.BOTTOM)


def test_where_nothing_worked_nothing_is_drawn(found) -> None:
    assert drawing.charts(replace(row_of(found, "broke"), before=None)) == []


def test_ratios_are_points_on_a_logarithmic_axis_around_the_band(found, figure) -> None:
    ratios, *_ = figure([found])
    assert ratios.get_xscale() == "log"
    points = [line for line in ratios.lines if line.get_marker() == "o"]
    rows = sorted(found.measured, key=lambda row: -row.ratio.median)
    order = ["grew", "shrank", "stayed"]
    assert [label.get_text().split()[0] for label in ratios.get_yticklabels()] == order
    by_kernel = {row.subject.kernel: row for row in rows}
    for point, kernel in zip(points, order, strict=True):
        row = by_kernel[kernel]
        assert point.get_xdata() == [row.ratio.median]
        assert (point.get_markerfacecolor() == "white") == (not row.sure)
    low, high = ratios.get_xlim()
    assert low < min(row.ratio.low for row in rows)
    assert high > max(row.ratio.high for row in rows)
    (band,) = ratios.patches
    assert math.isclose(band.get_x() + band.get_width(), 1.05)


def test_searches_end_at_the_best_of_both(found, figure) -> None:
    _, trials, minutes = figure([found])
    ends = [line.get_ydata()[-1] for line in trials.lines]
    assert len(ends) == len(minutes.lines) == 9, "3 rows in both, 3 in one"
    assert min(ends) == 1
    assert sorted(ends)[-2:] == pytest.approx([1.3, 1.5], rel=0.1)


def test_across_devices_there_is_no_band_and_each_search_ends_at_its_own_best(
    found, figure, tmp_path
) -> None:
    other = make_log(tmp_path / "other", "B", device="other-device")
    across = compare(found.before, Source.read(other))
    ratios, trials, _ = figure([across])
    assert not ratios.patches
    assert {line.get_ydata()[-1] for line in trials.lines} == {1.0}


def test_each_comparison_has_its_own_line_of_panels(found, figure) -> None:
    assert len(figure([found, found])) == 6


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_equal_comparisons_make_equal_files(found, tmp_path, suffix) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        plot.plot([found], path)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    if suffix == "svg":
        assert ElementTree.fromstring(first).tag.endswith("svg")
    else:
        assert first.startswith(b"\x89PNG")


def test_another_suffix_is_refused_and_nothing_is_written(found, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the drawing is .*x\.pdf'; expected a name in \.png or"):
        plot.plot([found], tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []
