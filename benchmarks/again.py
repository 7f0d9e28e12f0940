# python benchmarks/again.py [times [attention]]
"""Whether comparisons can be trusted: every winner of this device measured again, and again.

Nothing has changed in between, so that each row called faster or slower is a false alarm. Then one
row after the other is made 10 % slower, all its rounds, and should be called so. `attention` is how
the specs begin that are measured, by default all.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
from record import folder as records

from deft_tvm.compare.comparison import Verdict, compare
from deft_tvm.compare.sources import Source, Subject
from deft_tvm.tuning.again import measure_again
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import TRIALS, TuningLog, log_folders

TIMES = 5
SLOWER = 1.1


def measured(attention: str, scratch: str) -> Source:
    """The winners, measured once more."""
    folders = [f for f in log_folders(records().parent) if f.name.startswith(attention)]
    measure_again(*map(TuningLog, folders), into=scratch)
    return Source.read(scratch)


def planted(source: Source, subject: Subject) -> Source:
    """The same where one kernel is slower."""
    tuned = source.tuned[subject]
    slow = replace(tuned, trials=tuple(map(_slower, tuned.trials)))
    return replace(source, tuned={**source.tuned, subject: slow})


def found_slower(before: Source, after: Source) -> Iterator[Subject]:
    """Rows that are called slower once they are."""
    for subject in after.tuned:
        rows = compare(before, planted(after, subject)).having(Verdict.SLOWER)
        if subject in (row.subject for row in rows):
            yield subject


def _slower(trial: Trial) -> Trial:
    return msgspec.structs.replace(trial, latency_us=tuple(SLOWER * us for us in trial.latency_us))


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else TIMES
    attention = sys.argv[2] if len(sys.argv) > 2 else ""
    before = Source.read(records().parent)
    lines = b""
    for number in range(1, times + 1):
        with tempfile.TemporaryDirectory() as scratch:
            after = measured(attention, scratch)
            files = sorted(Path(scratch).glob(f"*/*/{TRIALS}"))
            lines += b"".join(file.read_bytes() for file in files)
        (records() / "again.jsonl").write_bytes(lines)
        found = compare(before, after)
        alarms = found.having(Verdict.FASTER, Verdict.SLOWER)
        slower = set(found_slower(before, after))
        assert found.mean is not None
        print(
            f"time {number}: {len(found.measured)} rows, {len(alarms)} false alarms, "
            f"geometric mean {found.mean.median:.3f}, "
            f"ratios {min(r.ratio.median for r in found.measured if r.ratio):.3f} to "
            f"{max(r.ratio.median for r in found.measured if r.ratio):.3f}; "
            f"{len(slower)} of {len(after.tuned)} found when they are {SLOWER - 1:.0%} slower",
            flush=True,
        )
        for row in alarms:
            assert row.ratio is not None and row.verdict is not None
            print(f"    {row.subject.kernel}, {row.subject.spec}: {row.ratio} {row.verdict.value}")
        for subject in after.tuned.keys() - slower:
            print(f"    not found: {subject.kernel}, {subject.spec}")
