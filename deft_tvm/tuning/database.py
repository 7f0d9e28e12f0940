"""MetaSchedule's own database beside the log, for TVM's tools to read.

The log is the truth and is written first; what a kill or a full disk left out of the database is
added from it the next time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import msgspec
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath, append_line
from deft_tvm.tuning.space import Space

FILES = ("database_workload.json", "database_tuning_record.json")
NEW = ".database_new_record.json"

FAILED_SECONDS = 1e10
"""What MetaSchedule stores for a candidate that failed."""


class Database:
    """The database in a folder; a line that was cut off is dropped.

    MetaSchedule replays the schedule of every record that it reads, a tenth of a second for each.
    So it writes each new one to a file of its own, whose line is then added to the others.

    A database that TVM cannot read, of another version of it perhaps, is put aside.

    Raises:
        LogError: here and in each method, it cannot be written.
    """

    def __init__(self, directory: AnyPath) -> None:
        paths = [Path(directory, name) for name in FILES]
        self._workloads, self._records = paths
        self._new = Path(directory, NEW)
        with self._writing():
            for path in paths:
                _drop_cut_off_line(path)
            self._new.write_bytes(b"")
        try:
            self._open()
        except Exception:
            for path in filter(Path.exists, paths):
                os.replace(path, path.with_suffix(".unreadable.json"))
            self._open()

    def _open(self) -> None:
        known = len(_lines(self._workloads))
        self._places = [_places_of(line) for line in _lines(self._records)]
        if any(workload >= known for workload, _ in self._places):
            raise ValueError(f"{self._workloads} lacks the workload of a record")
        self._database = ms.database.JSONDatabase(str(self._workloads), str(self._new))

    def __len__(self) -> int:
        return len(self._places)

    def add(self, space: Space, candidate: ms.MeasureCandidate, seconds: Sequence[float]) -> None:
        """One record; no seconds: the candidate failed."""
        with self._writing():
            os.truncate(self._new, 0)
            self._database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace,
                    self._database.commit_workload(space.module),
                    [*seconds] or [FAILED_SECONDS],
                    Target(dict(space.task.target)),
                    candidate.args_info,
                )
            )
            (line,) = _lines(self._new) or _no_room()
            places = _places_of(line)
            if places[0] >= len(_lines(self._workloads)):
                _no_room()
            append_line(self._records, line + b"\n")
        self._places.append(places)

    def missing(self, space: Space, numbers: Iterable[int]) -> list[int]:
        """Those of the decisions that have no record."""
        with self._writing():
            key = self._database.commit_workload(space.module).as_json()[0]
            keys = [msgspec.json.decode(line)[0] for line in _lines(self._workloads)]
            own = keys.index(key) if key in keys else _no_room()
        there = {space.number_at(places) for workload, places in self._places if workload == own}
        return [number for number in numbers if number not in there]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(
                f"MetaSchedule's database in {self._new.parent} cannot be written: "
                f"{error.strerror}; all trials are in the log beside it, and the same command goes "
                "on from there"
            ) from error


def _no_room() -> NoReturn:
    """MetaSchedule says nothing of a line that it could not write, or not as a whole."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _lines(path: Path) -> list[bytes]:
    """Those that are there as a whole."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line[:-1] for line in lines if line.endswith(b"\n")]


def _places_of(line: bytes) -> tuple[int, list[int]]:
    """Of a record: the place of its workload, and those of what its trace took of each choice."""
    workload, ((_, decisions), *_) = msgspec.json.decode(line)
    return workload, [place for _, place in decisions]


def _drop_cut_off_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
