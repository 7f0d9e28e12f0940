"""A comparison in words and numbers as people read them; shared by all that show one."""

from __future__ import annotations

from collections.abc import Sequence

from deft_tvm.compare.comparison import Comparison, Row, Verdict
from deft_tvm.compare.convergence import convergence
from deft_tvm.compare.sources import Source, Tuned
from deft_tvm.timing import SMALLEST, Summary
from deft_tvm.tuning.lines import Run

GROUPS: dict[str, tuple[Verdict | None, ...]] = {
    "worse": (Verdict.SLOWER,),
    "better": (Verdict.FASTER,),
    f"no sure change of {SMALLEST:.0%} or more": (Verdict.SAME,),
    "shares of two devices' limits": (None,),
    "failed": (Verdict.FAILED,),
    "only in A": (Verdict.ONLY_BEFORE,),
    "only in B": (Verdict.ONLY_AFTER,),
}
"""Rows under headings, in the order in which they are shown."""

COLUMNS = (
    *("kernel", "workload", "A µs", "B µs", "B/A", "95 %", "p", "n"),
    *("of the limit", ""),
)


def cells(row: Row) -> list[str]:
    """One row, under `COLUMNS`."""
    before, after = row.before, row.after
    return [
        row.subject.kernel,
        row.subject.workload,
        microseconds(before),
        microseconds(after),
        "" if row.ratio is None else f"{row.ratio.median:.3f}",
        "" if row.ratio is None else interval(row.ratio),
        p_value(row.p),
        " + ".join(str(len(t.samples)) for t in (before, after) if t and t.best),
        f"{share(before)} → {share(after)}",
        row.verdict.value if row.verdict else "",
    ]


def microseconds(tuned: Tuned | None) -> str:
    return f"{tuned.best.median_us:.1f}" if tuned and tuned.best else "–"


def share(tuned: Tuned | None) -> str:
    found = tuned.limit_share if tuned else None
    return "–" if found is None else f"{found:.0%}"


def interval(found: Summary) -> str:
    return f"{found.low:.3f} … {found.high:.3f}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def changed(row: Row) -> str:
    """Decisions in which the winners differ: ``out_dims 32 → 64``."""
    pairs = row.decisions.items()
    return ", ".join(f"{name} {_told(one)} → {_told(other)}" for name, (one, other) in pairs)


def how_it_converged(tuned: Tuned) -> str:
    """Trials and minutes until near the best, and failures by kind."""
    found = convergence(tuned)
    if not found.best_us:
        return "no search, measured again"
    if found.to_near is None:
        arrived = "nothing worked"
    else:
        arrived = f"within 5 % of its best after {found.to_near} of {len(found.best_us)} trials"
        if found.minutes_to_near is not None:
            arrived += f", {found.minutes_to_near:.1f} min"
    failures = ", ".join(f"{count} {kind}" for kind, count in sorted(found.failures.items()))
    return f"{arrived}; failed: {failures}" if failures else arrived


def summary(found: Comparison) -> str:
    """The mean, and how many rows went which way."""
    rows = found.measured
    if found.mean is None:
        return "no kernel has a time in both"
    mean = f"geometric mean B/A {found.mean.median:.3f} ({interval(found.mean)})"
    if found.across_devices:
        what = "in parts of each device's limit, which are two devices"
    else:
        counts = (
            f"{len(found.having(verdict))} {word}"
            for word, verdict in (
                ("slower", Verdict.SLOWER),
                ("faster", Verdict.FASTER),
                ("not surely changed", Verdict.SAME),
            )
        )
        what = ", ".join(counts)
    return f"{mean} of {len(rows)} in both; {what}"


def notes(found: Comparison) -> list[str]:
    """What a reader must know before believing it."""
    told = []
    rows = found.measured
    plain = [row for row in rows if not row.anchored]
    if plain and not found.across_devices:
        told.append(
            f"{len(plain)} of {len(rows)} rows have nothing measured beside them: a slow hour of "
            "the machine cannot be told from a slow kernel"
        )
    if found.shared != 1.0:
        told.append(
            f"most rows share a ratio, of which {found.shared:.3f} is taken for the hour's: a row "
            "is called changed if it is without that, too"
        )
    settled = [row for row in rows if all(t and t.final for t in (row.before, row.after))]
    if untested := [row for row in settled if row.p is None and not found.across_devices]:
        told.append(f"{len(untested)} of {len(rows)} rows have too few passes to be tested")
    if unsettled := [row for row in rows if row not in settled]:
        told.append(
            f"{len(unsettled)} of {len(rows)} rows have no last measurement: the best of a noisy "
            "search looks better than it is"
        )
    if (
        not found.across_devices
        and len({_rates(s) for s in (found.before, found.after)} - {None}) > 1
    ):
        told.append(
            "the rates in device.json differ, by which work is divided: kernels may have had other "
            "work to do"
        )
    for letter, source in (("A", found.before), ("B", found.after)):
        if source.skipped:
            lines = "line" if source.skipped == 1 else "lines"
            told.append(f"{source.skipped} damaged {lines} of {letter} skipped")
    return told


def _rates(source: Source) -> tuple[float, ...] | None:
    """By which the last run planned; None where a log does not tell."""
    if not source.runs:
        return None
    last = source.runs[-1]
    return (last.read_bandwidth, *last.matrix_rate.values())


def header(source: Source) -> list[tuple[str, str]]:
    """What a log was made on and with."""
    around = source.surroundings
    commits = sorted({trial.commit for trial in source.trials if trial.commit})
    last: Run | None = source.runs[-1] if source.runs else None
    runs = {trial.run for trial in source.trials}
    lines = [
        ("log", source.label),
        ("device", f"{around.device} {around.name}".strip()),
        ("features", " ".join(around.features)),
        ("driver", around.driver),
        ("versions", ", ".join(f"{name} {version}" for name, version in around.versions)),
        ("commit", ", ".join(commits)),
        ("trials", f"{len(source.trials)} in {len(runs)} runs"),
        ("budget", "" if last is None else _budget(last)),
        ("seed", "" if last is None else str(last.seed)),
        ("measured", around.measured),
        ("runner", around.runner),
    ]
    return [(name, value) for name, value in lines if value]


def headers(found: Comparison) -> dict[str, tuple[str, str]]:
    """What both logs were made on and with, by name; a dash where one does not say."""
    one, other = dict(header(found.before)), dict(header(found.after))
    names = dict.fromkeys((*one, *other))
    return {name: (one.get(name, "–"), other.get(name, "–")) for name in names}


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by heading, the largest ratio first; no empty ones."""
    found = []
    for heading, verdicts in GROUPS.items():
        of_it = [row for row in rows if row.verdict in verdicts]
        if of_it:
            found.append((heading, sorted(of_it, key=_by_ratio)))
    return found


def _by_ratio(row: Row) -> float:
    return -row.ratio.median if row.ratio else 0.0


def _budget(run: Run) -> str:
    if run.trials == 0:
        return "none, winners were measured again"
    parts = [f"{run.trials} trials"] if run.trials is not None else []
    parts += [f"{run.minutes:g} minutes"] if run.minutes is not None else []
    return ", ".join(parts) or "every decision"


def _told(value: int | None) -> str:
    return "none" if value is None else str(value)
