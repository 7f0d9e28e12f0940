"""Measurements as tables: rows of text, for a terminal or for a document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from deft_tvm.bench.compare import Change, Verdict
from deft_tvm.bench.measure import OTHERS, Measurement
from deft_tvm.bench.step import MERGE, OURS, PARTIAL, PLAN, RUN
from deft_tvm.timing import Summary, Timing

CALLS = ("ms", "median", "95 %", "ours is faster", "95 %")
LAYERS = 32
"""Of a model, among which a plan is divided."""

Rows = list[tuple[str, ...]]

SPEED = ("workload", "attention", "ms", "95 %", "of limit", "best peer", "ms", "faster", "95 %")
PARTS = ("workload", "attention", "plan µs", "partial", "merge", "call", "plan / layers", "between")
GROUPED = ("workload", "attention", "chosen", "ms", *OTHERS)
CHANGED = ("workload", "attention", "before", "after", "ratio", "")


def calls(found: Measurement) -> Rows:
    """One measurement: ours, then its peers, the fastest first."""
    speedups = found.speedups()
    return [_call(found, name, speedups.get(name)) for name in (OURS, *speedups)]


def of_ours(found: Measurement) -> str:
    """Where our time goes, in a line."""
    named = (f"{name} {1e3 * timing.median:.3f} ms" for name, timing in found.parts.items())
    return ", ".join(named)


def speed(found: Iterable[Measurement]) -> Rows:
    """Each cell beside its fastest peer and its limit."""
    return [_speed(each) for each in found]


def parts(found: Iterable[Measurement]) -> Rows:
    """Where the time of each cell goes, in microseconds; between products, and alone."""
    return [_parts(each) for each in found]


def grouped(found: Iterable[Measurement]) -> Rows:
    """One run by the plan that was chosen, and times as long by the others' plans."""
    return [_grouped(each) for each in found]


def peers(found: Iterable[Measurement], names: Sequence[str]) -> Rows:
    """Milliseconds of each peer, and a dash where it was left out."""
    return [_peers(each, names) for each in found]


def changed(changes: Iterable[Change]) -> Rows:
    """Cells of two records, in percent of the limit."""
    return [
        (
            change.workload,
            short(change.spec),
            percent(change.before),
            percent(change.after),
            f"{change.ratio:.2f}×",
            "" if change.verdict is Verdict.SAME else change.verdict.value,
        )
        for change in changes
    ]


def summary(found: Iterable[Measurement]) -> list[str]:
    """Geometric means over the cells of each dtype, and the cells that a peer is ahead of."""
    lines = []
    by_dtype: dict[str, list[float]] = {}
    behind = []
    for each in found:
        if speedups := each.speedups():
            best, ratio = next(iter(speedups.items()))
            by_dtype.setdefault(field(each.spec, "dtype"), []).append(ratio.median)
            if ratio.high < 1:
                behind.append(f"behind {best}: {each.workload}, {short(each.spec)}")
    for dtype, ratios in by_dtype.items():
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines.append(f"{dtype}: {mean:.2f}× the best peer, geometric mean of {len(ratios)} cells")
    return lines + behind


def markdown(columns: Sequence[str], rows: Rows) -> str:
    """A table as GitHub shows it, its first two columns to the left."""
    rule = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    lines = (columns, rule, *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def short(spec: str) -> str:
    """An attention without what all cells share: ``gqa 32/8 d128 bf16``."""
    kind, _, _ = spec.partition(":")
    heads = f"{field(spec, 'hq')}/{field(spec, 'hkv') or 1}"
    return f"{kind} {heads} d{field(spec, 'd')} {field(spec, 'dtype')}"


def _call(found: Measurement, name: str, ratio: Summary | None) -> tuple[str, ...]:
    return (name, *_milliseconds(found.timings[name], 3), *_times_faster(ratio))


def _speed(found: Measurement) -> tuple[str, ...]:
    best, ratio = next(iter(found.speedups().items()), ("", None))
    return (
        found.workload,
        short(found.spec),
        *_milliseconds(found.timings[OURS], 2),
        percent(found.share),
        best,
        _milliseconds(found.timings[best], 2)[0] if best else "",
        *_times_faster(ratio),
    )


def _milliseconds(timing: Timing, digits: int) -> tuple[str, str]:
    """The median, and the interval around it."""
    own = timing.summary
    median, low, high = (f"{1e3 * each:.{digits}f}" for each in (own.median, own.low, own.high))
    return median, f"{low} to {high}"


def _times_faster(ratio: Summary | None) -> tuple[str, str]:
    """The same of a ratio; nothing where there is none."""
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f}×", f"{ratio.low:.2f} to {ratio.high:.2f}"


def _peers(found: Measurement, names: Sequence[str]) -> tuple[str, ...]:
    timings = found.peers
    medians = (_milliseconds(timings[name], 2)[0] if name in timings else "–" for name in names)
    return (found.workload, short(found.spec), *medians)


def _parts(found: Measurement) -> tuple[str, ...]:
    plan, run, partial, merge = (
        1e6 * found.parts[part].median for part in (PLAN, RUN, PARTIAL, MERGE)
    )
    return (
        found.workload,
        short(found.spec),
        f"{plan:.0f}",
        f"{partial:.0f}",
        f"{merge:.0f}",
        f"{run - partial - merge:.0f}",
        f"{plan / LAYERS:.0f}",
        f"{found.between_ratio.median:.2f}×" if found.between else "",
    )


def _grouped(found: Measurement) -> tuple[str, ...]:
    own = found.groupings[OURS]
    return (
        found.workload,
        short(found.spec),
        found.grouping,
        f"{1e3 * own.median:.2f}",
        *(_times(found.groupings.get(name), own) for name in OTHERS),
    )


def _times(other: Timing | None, own: Timing) -> str:
    return "" if other is None else f"{other.median / own.median:.2f}×"


def percent(share: Summary) -> str:
    return f"{100 * share.median:.0f} %"


def field(spec: str, name: str) -> str:
    """What a spec's string says of one field; nothing where it does not."""
    fields = dict(part.partition("=")[::2] for part in spec.partition(":")[2].split(","))
    return fields.get(name, "")
