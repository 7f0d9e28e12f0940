"""``python -m deft_tvm.gpu_check.table FILE``: what `bench` has found, as a table."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deft_tvm.bench.core import Cell
from deft_tvm.bench.report import short
from deft_tvm.cli import end_with_code
from deft_tvm.errors import InputError
from deft_tvm.gpu_check.lines import Lines
from deft_tvm.gpu_check.rates import Rates
from deft_tvm.gpu_check.speeds import FILE, PAPERS, Begun, Beside, Found, Ours
from deft_tvm.spec import AttentionSpec

COLUMNS = (
    *("attention", "workload", "µs", "plan µs", "floor µs", "of it", "of matrix"),
    *("best peer", "µs", "ratio", *PAPERS, "exact"),
)


class Row(NamedTuple):
    """One cell: ours, and what was measured beside it."""

    ours: Ours
    peers: dict[str, Beside]
    groupings: dict[str, Beside]
    rates: Rates

    @property
    def floor(self) -> float:
        """Seconds to read the cell's KV once, at the rate of a copy."""
        limit = self.ours.limit
        return 0.0 if limit is None else limit.num_bytes / self.rates.copy_bandwidth

    @property
    def best(self) -> Beside | None:
        """The fastest peer that is right."""
        return min(self.peers.values(), key=lambda peer: peer.median, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the fastest peer ours is."""
        return None if self.best is None else self.best.median / self.ours.median


def rows_of(found: Iterable[Found]) -> list[Row]:
    """The cells in which ours was timed, each as it was measured last."""
    rates: Rates | None = None
    rows: dict[Cell, Row] = {}
    for line in found:
        if isinstance(line, Begun):
            rates = line.rates
        elif line.failed or rates is None:
            continue
        elif isinstance(line, Ours):
            rows[line.cell] = Row(line, {}, {}, rates)
        elif (row := rows.get(line.cell)) is not None:
            (row.groupings if line.name in PAPERS else row.peers)[line.name] = line
    return list(rows.values())


def report(found: Sequence[Found]) -> str:
    """A table of all cells, geometric means, and what was left out and why."""
    rows = rows_of(found)
    lines = [*_aligned([COLUMNS, *map(_texts, rows)]), "", *_means(rows), *_left_out(found)]
    return "\n".join(lines)


def _texts(row: Row) -> tuple[str, ...]:
    ours, best, ratio = row.ours, row.best, row.ratio
    exact = ours.exactness
    rate = row.rates.device.matrix_rate[AttentionSpec.parse(ours.cell.spec).dtype]
    flops = 0 if ours.limit is None else ours.limit.flops
    return (
        short(ours.cell.spec),
        ours.cell.workload,
        _us(ours.median),
        _us(ours.plan),
        _us(row.floor),
        f"{row.floor / ours.median:.0%}",
        f"{flops / rate / ours.median:.0%}",
        "" if best is None else best.name + ("" if best.in_graph else " (no graph)"),
        "" if best is None else _us(best.median),
        "" if ratio is None else f"{ratio:.2f}×",
        *(_times(row.groupings.get(name), ours) for name in PAPERS),
        "" if exact is None else "yes" if exact.holds else "NO",
    )


def _means(rows: Sequence[Row]) -> Iterator[str]:
    """Geometric means over the best peer, of all and of each attention; over each peer."""
    ratios = {row.ours.cell: row.ratio for row in rows if row.ratio is not None}
    if ratios:
        yield f"{_mean(ratios.values())} the best peer: geometric mean of {len(ratios)} cells"
    for spec in dict.fromkeys(cell.spec for cell in ratios):
        own = [ratio for cell, ratio in ratios.items() if cell.spec == spec]
        yield f"  {_mean(own)} {short(spec)}, {len(own)} cells"
    for kind, names in (("peers", _names(rows, "peers")), ("groupings", PAPERS)):
        for name in names:
            pairs = [
                (beside, row.ours)
                for row in rows
                if (beside := getattr(row, kind).get(name)) is not None
            ]
            if pairs:
                mean = _mean([beside.median / ours.median for beside, ours in pairs])
                yield f"{mean} {name}, {len(pairs)} cells"
    behind = [row for row in rows if row.ratio is not None and row.ratio < 1]
    for row in sorted(behind, key=lambda row: row.ratio or 0):
        best = row.best
        assert best is not None
        cell = f"{short(row.ours.cell.spec)} {row.ours.cell.workload}"
        yield f"behind {best.name}, {row.ratio:.2f}×: {cell}"


def _left_out(found: Sequence[Found]) -> Iterator[str]:
    """Each reason once, with the number of cells."""
    reasons: dict[tuple[str, str], int] = {}
    for line in found:
        if not isinstance(line, Begun) and line.failed:
            key = line.name if isinstance(line, Beside) else "ours", line.failed
            reasons[key] = reasons.get(key, 0) + 1
    for (name, why), count in reasons.items():
        yield f"left out {name}, {count} times: {why}"


def _names(rows: Sequence[Row], kind: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in getattr(row, kind)))


def _mean(ratios: Iterable[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}×"


def _times(other: Beside | None, ours: Ours) -> str:
    return "" if other is None else f"{other.median / ours.median:.2f}×"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            text.ljust(width) if number < 2 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def main() -> None:
    """Print the table of a file.

    Raises:
        InputError: it has no line of `bench`.
        OSError: it cannot be read.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help=f"{FILE} of a stage's folder")
    file = parser.parse_args().file
    file.read_bytes()  # what is not there counts as no lines to those who begin one
    found: list[Found] = Lines[Found](file, Found).found
    if not found:
        raise InputError(f"FILE is {str(file)!r}, which has no line of bench; expected {FILE}")
    print(report(found))


if __name__ == "__main__":
    end_with_code(main)
