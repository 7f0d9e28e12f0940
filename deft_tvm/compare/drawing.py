"""Where things lie in drawings of a comparison: ratios on an axis, and searches as curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deft_tvm.compare.comparison import Comparison, Row
from deft_tvm.compare.convergence import Convergence, convergence

NARROWEST = 1.2
"""The axis of ratios reaches at least from 1/1.2 to 1.2."""

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 58, 322, 14, 136
"""Of a chart, and the edges of its axes, in its own units."""
FLATTEST = 1.05
"""Of a chart's highest to its lowest: less is noise, and would look like a cliff."""


@dataclass(frozen=True)
class Axis:
    """Ratios from ``1 / most`` to ``most``, logarithmic."""

    most: float

    @classmethod
    def of(cls, found: Comparison) -> Axis:
        """As wide as the widest interval."""
        ratios = [row.ratio for row in found.measured if row.ratio is not None]
        return cls(max([NARROWEST, *(max(each.high, 1 / each.low) for each in ratios)]))

    def at(self, ratio: float) -> float:
        """Percent of the width, from the left."""
        return round(50 + 50 * math.log(ratio) / math.log(self.most), 2)


@dataclass(frozen=True)
class Curve:
    """One log's search, in units of the chart.

    Attributes:
        letter: ``A`` or ``B``.
        path: a step down wherever something better was found, as SVG writes it.
        near: where it was within 5 % of its best.
        end: its last point.
    """

    letter: str
    path: str
    near: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """Both logs' searches of one subject on common axes.

    Attributes:
        against: what the horizontal axis counts.
        first, last: its ends.
        ticks: heights in units of the chart, and the µs there in words.
        curves: at most one of each log.
    """

    against: str
    first: str
    last: str
    ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...]


def searches(row: Row) -> dict[str, Convergence]:
    """Of the logs, ``A`` or ``B``, whose search found something."""
    sides = (("A", row.before), ("B", row.after))
    found = {letter: convergence(tuned) for letter, tuned in sides if tuned is not None}
    return {letter: each for letter, each in found.items() if each.to_near is not None}


def charts(row: Row) -> list[Chart]:
    """Against trials, then against minutes; none where no search found anything."""
    worked = searches(row)
    if not worked:
        return []
    trials = {letter: range(1, len(each.best_us) + 1) for letter, each in worked.items()}
    minutes = {letter: each.minutes for letter, each in worked.items()}
    return [_chart("trials", worked, trials), _chart("minutes", worked, minutes)]


def _chart(
    against: str, found: dict[str, Convergence], spent: Mapping[str, Sequence[float]]
) -> Chart:
    all_spent = [at for each in spent.values() for at in each]
    first, last = min(all_spent), max(all_spent)
    seen = [us for each in found.values() for us in each.best_us if us < math.inf]
    low, high = min(seen), max(max(seen), FLATTEST * min(seen))

    def place(at: float, us: float) -> tuple[float, float]:
        across = (at - first) / (last - first) if last > first else 1.0
        up = math.log(us / low) / math.log(high / low)
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM + up * (TOP - BOTTOM), 1)

    curves = []
    for letter, search in found.items():
        points = [
            place(at, us)
            for at, us in zip(spent[letter], search.best_us, strict=True)
            if us < math.inf
        ]
        assert search.to_near is not None
        near = points[search.to_near - 1 - len(search.best_us)]
        curves.append(Curve(letter, " ".join(_steps(points)), near, points[-1]))
    ticks = tuple((place(first, us)[1], _us(us)) for us in (low, math.sqrt(low * high), high))
    return Chart(against, _spent(first), _spent(last), ticks, tuple(curves))


def _spent(at: float) -> str:
    """Trials are whole, minutes are not."""
    return str(at) if isinstance(at, int) else f"{at:.1f}"


def _us(us: float) -> str:
    return f"{us:,.0f}" if us >= 100 else f"{us:.3g}"


def _steps(points: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Only where it falls, and the end: a search of hundreds of trials has few such places."""
    (x, y), (end, _) = points[0], points[-1]
    yield f"M{x} {y}"
    for across, down in points:
        if down != y:
            yield f"H{across}V{down}"
            y = down
    yield f"H{end}"
