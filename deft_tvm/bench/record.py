"""A file of measurements, with what they were made on and with; one JSON object a line.

    {"schema": 1, "device": "amd-epyc-...", "commit": "c680a46", "versions": {...}, ...}
    {"workload": "few_shot:...", "spec": "gqa:...", "timings": {...}, ...}

A file that is being written has another name, and takes its own once it is whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec
import torch

from deft_tvm.bench.measure import Measurement
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath, from_json
from deft_tvm.manifest import installed_versions, source_commit
from deft_tvm.tuning.process import HUGE_PAGES

SCHEMA = 1

Line = TypeVar("Line", bound=msgspec.Struct)


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What measurements were made on and with.

    Attributes:
        schema: of the file.
        device: slug of the machine.
        name: as the machine calls itself.
        date: when it was begun, UTC.
        commit: of the source tree, empty outside one.
        versions: of the packages that have a part in it.
        threads: of torch, on which ours runs too.
        huge_pages: torch was told to put tensors, ours and the peers', into pages of 2 MiB.
    """

    schema: int
    device: str
    name: str
    date: str
    commit: str
    versions: dict[str, str]
    threads: int
    huge_pages: bool = False

    @classmethod
    def here(cls) -> Origin:
        """Of this process, now."""
        profile = DeviceProfile.detect()
        return cls(
            schema=SCHEMA,
            device=profile.slug,
            name=profile.name,
            date=datetime.now(timezone.utc).isoformat(timespec="minutes"),
            commit=source_commit(),
            versions=installed_versions(),
            threads=torch.get_num_threads(),
            huge_pages=HUGE_PAGES.items() <= os.environ.items(),
        )


class Record(msgspec.Struct, frozen=True):
    """What a file holds: `measurements` in the order they were made."""

    origin: Origin
    measurements: tuple[Measurement, ...]

    @classmethod
    def of(cls, measuring: Iterable[Measurement], path: AnyPath | None = None) -> Record:
        """All that is measured; at `path`, if that is given, each as soon as it is there.

        Raises:
            LogError: no file can be written at `path`; found before anything is measured.
        """
        origin = Origin.here()
        if path is None:
            return cls(origin, tuple(measuring))
        with _Writer(Path(path)) as writer:
            writer.add(origin)
            return cls(origin, tuple(map(writer.add, measuring)))

    @property
    def by_cell(self) -> dict[tuple[str, str], Measurement]:
        """The measurements by workload and spec."""
        return {(each.workload, each.spec): each for each in self.measurements}

    @classmethod
    def read(cls, path: AnyPath) -> Record:
        """All of a file.

        Raises:
            LogError: there is none, it is of a later schema, or no such file.
        """
        try:
            first, *rest = Path(path).read_bytes().splitlines()
            schema = from_json(first, _Versioned).schema
            if schema > SCHEMA:
                raise LogError(f"{path}: schema is {schema}; expected at most {SCHEMA}")
            origin = from_json(first, Origin)
            found = [from_json(line, Measurement) for line in rest]
        except OSError as error:
            raise LogError(f"{path}: {error.strerror}; expected a file of measurements") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise LogError(f"{path} is no file of measurements: {error}") from None
        return cls(origin, tuple(found))


class _Versioned(msgspec.Struct):
    schema: int


class _Writer:
    """Lines on the disk, one at a time; within ``with`` the file has a name of its own.

    Where the block ends in an exception, what was measured stays under that name.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, 0

    def __enter__(self) -> _Writer:
        try:
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = self._path.with_name(f"{self._path.name}.partial")
            self._file = open(self._scratch, "wb")
        except OSError as error:
            raise LogError(
                f"{self._path} cannot be written: {error.strerror}; expected a file in a folder "
                "that can"
            ) from None
        return self

    def add(self, line: Line) -> Line:
        """Append one; it is on the disk when this returns it."""
        self._lines += 1
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return line

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._scratch, self._path)
        elif self._lines < 2:  # where from, and no measurement
            self._scratch.unlink()
