"""Measurements as drawings. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deft_tvm.bench.measure import Measurement
from deft_tvm.bench.report import field, short
from deft_tvm.figures import BLUE, GREY, ORANGE, plain, pyplot, save
from deft_tvm.files import AnyPath

COLOURS = {"f32": BLUE, "bf16": ORANGE}


def core(found: Sequence[Measurement], path: AnyPath) -> None:
    """Of every cell, how many times faster than the fastest peer, and its share of the limit."""
    cells = [each for each in reversed(found) if each.peers]
    figure, (speed, share) = pyplot.subplots(
        1, 2, sharey=True, figsize=(10, 1 + 0.24 * len(cells)), width_ratios=(3, 2)
    )
    for place, each in enumerate(cells):
        ratio = next(iter(each.speedups().values()))
        colour = COLOURS.get(field(each.spec, "dtype"), GREY)
        speed.barh(place, ratio.median, color=colour, height=0.7)
        speed.plot((ratio.low, ratio.high), (place, place), color="black", linewidth=1)
        share.barh(place, 100 * each.share.median, color=colour, height=0.7)
    names = [f"{each.workload.partition(',')[0]}  {short(each.spec)}" for each in cells]
    speed.set_yticks(range(len(cells)), names, fontsize=7)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xlabel("times faster than the fastest peer, 95 %")
    share.axvline(100, color="black", linewidth=0.8)
    share.set_xlabel("% of the machine's limit")
    for axes in (speed, share):
        plain(axes)
    speed.margins(y=0.01)
    save(figure, path)


@dataclass(frozen=True)
class Line:
    """Points of one curve, by its name."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def lines(
    panels: Sequence[tuple[str, Sequence[Line]]], y_label: str, path: AnyPath, *, log: bool = False
) -> None:
    """Panels side by side, each with its label below and curves in it."""
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 3.6), sharey=log, squeeze=False
    )
    for axes, (x_label, curves) in zip(row[0], panels, strict=True):
        for curve in curves:
            style = {"linestyle": "--", "color": GREY} if curve.dashed else {"marker": "."}
            axes.plot(curve.x, curve.y, label=curve.name, **style)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.legend(fontsize=7, frameon=False)
        plain(axes)
    row[0][0].set_ylabel(y_label)
    save(figure, path)
