"""MetaSchedule's own database beside the log, for TVM's tools to read.

The log is the truth and is written first; whatever a kill left out of the database is added from it
the next time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from deft_tvm.tuning.log import AnyPath
from deft_tvm.tuning.space import Space

FILES = ("database_workload.json", "database_tuning_record.json")

FAILED_SECONDS = 1e10
"""What MetaSchedule stores for a candidate that failed."""


class Database:
    """The database in a folder; a line that was cut off is dropped.

    A database that TVM cannot read, of another version of it perhaps, is put aside.
    """

    def __init__(self, directory: AnyPath) -> None:
        paths = [Path(directory, name) for name in FILES]
        for path in paths:
            _drop_cut_off_line(path)
        try:
            self._database = ms.database.JSONDatabase(*map(str, paths))
        except Exception:
            for path in filter(Path.exists, paths):
                os.replace(path, path.with_suffix(".unreadable.json"))
            self._database = ms.database.JSONDatabase(*map(str, paths))

    def __len__(self) -> int:
        return len(self._database)

    def add(self, space: Space, candidate: ms.MeasureCandidate, seconds: Sequence[float]) -> None:
        """One record; no seconds: the candidate failed."""
        self._database.commit_tuning_record(
            ms.database.TuningRecord(
                candidate.sch.trace,
                self._database.commit_workload(space.module),
                [*seconds] or [FAILED_SECONDS],
                Target(dict(space.task.target)),
                candidate.args_info,
            )
        )

    def missing(self, space: Space, numbers: Iterable[int]) -> list[int]:
        """Those of the decisions that have no record."""
        own = self._database.commit_workload(space.module)  # the one that is there, if it is
        traces = (
            record.trace
            for record in self._database.get_all_tuning_records()
            if record.workload.same_as(own)
        )
        there = {space.number(space.decision_of(trace)) for trace in traces}
        return [number for number in numbers if number not in there]


def _drop_cut_off_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
