"""Comparisons as a drawing: each row's ratio, and how both logs' searches came to their best.

Needs matplotlib (the extra ``plot``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

from deft_tvm.bench.report import short
from deft_tvm.compare import words
from deft_tvm.compare.comparison import Comparison, Row
from deft_tvm.compare.drawing import Axis, searches
from deft_tvm.figures import BLUE, ORANGE, plain, pyplot, save
from deft_tvm.files import AnyPath
from deft_tvm.timing import SMALLEST

BAND = "#e8e8e8"
STYLES: dict[str, dict[str, Any]] = {
    "A": {"color": BLUE},
    "B": {"color": ORANGE, "linestyle": "--"},
}
LOWEST = 3.6
"""Inches of a comparison of few rows."""


def plot(found: Sequence[Comparison], path: AnyPath) -> None:
    """One comparison below the other, into a ``.png`` or ``.svg``.

    Raises:
        InputError: `path` is named otherwise.
    """
    heights = [max(LOWEST, 1.2 + 0.26 * len(each.measured)) for each in found]
    figure, grid = pyplot.subplots(
        len(found),
        3,
        figsize=(14, sum(heights)),
        height_ratios=heights,
        width_ratios=(3, 2, 2),
        squeeze=False,
    )
    for each, (ratios, trials, minutes) in zip(found, grid, strict=True):
        _ratios(ratios, each)
        _searches(trials, minutes, each.rows)
    save(figure, path)


def _ratios(axes: Any, found: Comparison) -> None:
    """A point and its interval for each row; full where chance does not explain it."""
    rows = [row for _, of_it in words.groups(found.measured) for row in of_it]
    for place, row in enumerate(rows):
        assert row.ratio is not None
        inside = None if row.sure else "white"
        axes.plot((row.ratio.low, row.ratio.high), (place, place), color=BLUE, linewidth=1.5)
        axes.plot(row.ratio.median, place, "o", color=BLUE, markerfacecolor=inside)
    most = Axis.of(found).most
    axes.set_xscale("log")
    axes.set_xlim(most**-1.05, most**1.05)
    axes.xaxis.set_major_locator(LogLocator(base=2) if most > 2 else MaxNLocator(5))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=0.8)
    if found.across_devices:
        axes.set_xlabel("B/A in parts of each device's limit, 95 %")
    else:
        axes.axvspan(1 / (1 + SMALLEST), 1 + SMALLEST, color=BAND, zorder=0)
        axes.set_xlabel(f"B/A, 95 %; the band is {SMALLEST:.0%}, a full point is not by chance")
    axes.set_yticks(range(len(rows)), map(_name, rows), fontsize=7, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(
        f"A  {found.before.label}\nB  {found.after.label}", loc="left", fontsize=8, parse_math=False
    )
    plain(axes)


def _searches(trials: Any, minutes: Any, rows: Sequence[Row]) -> None:
    """Of each row both logs' best so far, over the best of both; across devices, over its own."""
    for row in rows:
        found = searches(row)
        best_of_both = min((each.best_us[-1] for each in found.values()), default=math.nan)
        for letter, each in found.items():
            lowest = each.best_us[-1] if row.across_devices else best_of_both
            times = [us / lowest if us < math.inf else math.nan for us in each.best_us]
            style = {"drawstyle": "steps-post", "linewidth": 1, "alpha": 0.8, **STYLES[letter]}
            trials.plot(range(1, len(times) + 1), times, **style)
            minutes.plot(each.minutes, times, **style)
    for axes, label in ((trials, "trials"), (minutes, "minutes")):
        axes.set_xlabel(label)
        plain(axes)
    trials.set_ylabel("best so far, the best is 1")
    trials.legend(
        handles=[pyplot.Line2D((), (), label=letter, **style) for letter, style in STYLES.items()],
        frameon=False,
    )


def _name(row: Row) -> str:
    subject = row.subject
    return f"{subject.kernel}  {subject.workload.partition(',')[0]}  {short(subject.spec)}"
