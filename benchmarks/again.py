# python benchmarks/again.py [times]
"""Whether comparisons can be trusted: every winner of this device measured again, and again.

Nothing has changed in between, so that each row called faster or slower is a false alarm.
"""

from __future__ import annotations

import sys
import tempfile

from record import folder as records

from deft_tvm.compare.comparison import Verdict, compare
from deft_tvm.compare.sources import Source
from deft_tvm.tuning.again import measure_again
from deft_tvm.tuning.log import TuningLog, log_folders

TIMES = 5


def measured(scratch: str) -> Source:
    """All winners, measured once more."""
    for folder in log_folders(records().parent):
        measure_again(TuningLog(folder), into=scratch)
    return Source.read(scratch)


if __name__ == "__main__":
    times = int(sys.argv[1]) if len(sys.argv) > 1 else TIMES
    before = Source.read(records().parent)
    for number in range(1, times + 1):
        with tempfile.TemporaryDirectory() as scratch:
            found = compare(before, measured(scratch))
        alarms = found.having(Verdict.FASTER, Verdict.SLOWER)
        assert found.mean is not None
        print(
            f"time {number}: {len(found.measured)} rows, {len(alarms)} false alarms, "
            f"geometric mean {found.mean.median:.3f}, "
            f"ratios {min(r.ratio.median for r in found.measured if r.ratio):.3f} to "
            f"{max(r.ratio.median for r in found.measured if r.ratio):.3f}",
            flush=True,
        )
        for row in alarms:
            assert row.ratio is not None and row.verdict is not None
            print(f"    {row.subject.kernel}, {row.subject.spec}: {row.ratio} {row.verdict.value}")
