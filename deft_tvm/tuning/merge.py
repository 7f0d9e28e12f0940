"""Logs of several machines as one: every line of each, once, in the order of their runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath, write_whole
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.lines import Line, Run, decode
from deft_tvm.tuning.log import DEVICE, TRIALS, TuningLog, log_folders

Identity = tuple[str, int]
"""Run, and number of the trial in it; -1 for the line of the run itself."""


@dataclass(frozen=True)
class Merged:
    """One log that was written.

    Attributes:
        log: where.
        sources: logs whose lines it has beside those that it had.
        lines: in it now.
        added: of these, new ones.
        skipped: damaged lines, of the sources and of the log itself, that are left out.
    """

    log: TuningLog
    sources: tuple[Path, ...]
    lines: int
    added: int
    skipped: int


def merge(paths: Sequence[AnyPath], into: AnyPath) -> list[Merged]:
    """Merge all logs under `paths` into the logs under the folder `into`, by device and spec.

    A line is copied as it stands, once; what is there already stays. A reader sees the log as it
    was or as it is.

    Raises:
        LogError: a path has no log, two lines claim to be the same trial and differ, or one is of a
            newer schema or names what is no device.
        TuningError: a tuning writes a log that would have to be changed.
    """
    folders = [folder for path in paths for folder in _some(path)]
    by_place: dict[Path, list[Path]] = {}
    for folder in folders:
        line = _first_line(folder)
        if line is not None:
            if not re.fullmatch(r"\w[\w.-]*", line.device):
                raise LogError(
                    f"{folder}: device is {line.device!r}; expected letters, digits, - and _"
                )
            place = Path(into, line.device, AttentionSpec.parse(line.spec).slug)
            by_place.setdefault(place, []).append(folder)
    return [_merge(TuningLog(place), sources) for place, sources in by_place.items()]


def _some(path: AnyPath) -> list[Path]:
    found = log_folders(path)
    if not found:
        raise LogError(f"{path} has no log in it; expected a tuning log, or folders of them")
    return found


def _first_line(folder: Path) -> Line | None:
    """What tells device and spec; None for a log in which nothing can be read."""
    reading = TuningLog(folder).read()
    return next(iter((*reading.runs.values(), *reading)), None)


def _merge(log: TuningLog, sources: Sequence[Path]) -> Merged:
    with log.only_writer():
        kept, damaged = _lines([log.directory] if log.exists() else [])
        found, skipped = _lines(sources)
        both = {**kept, **found}
        for identity in kept.keys() & found.keys():
            _check_equal(identity, kept[identity], found[identity], log.path)
        began = _beginnings(both)
        ordered = sorted(both.items(), key=lambda pair: (began[pair[0][0]], pair[0][0]))
        write_whole(log.path, b"".join(line + b"\n" for _, line in ordered))
        _keep_profile(log.directory.parent, [source.parent for source in sources])
    return Merged(log, tuple(sources), len(both), len(both) - len(kept), skipped + damaged)


def _lines(folders: Iterable[Path]) -> tuple[dict[Identity, bytes], int]:
    """The lines of some logs by what they are, in order, and how many cannot be read."""
    found: dict[Identity, bytes] = {}
    skipped = 0
    for folder in folders:
        path = folder / TRIALS
        for line in filter(None, path.read_bytes().splitlines()):
            try:
                identity = _identity(decode(line))
            except msgspec.MsgspecError:
                skipped += 1
                continue
            except LogError as error:
                raise LogError(f"{path}: {error}") from None
            if identity in found:
                _check_equal(identity, found[identity], line, path)
            found[identity] = line
    return found, skipped


def _identity(line: Line) -> Identity:
    return (line.run, -1) if isinstance(line, Run) else line.identity


def _check_equal(identity: Identity, one: bytes, other: bytes, path: Path) -> None:
    if decode(one) != decode(other):
        run, trial = identity
        what = f"trial {trial} of run {run}" if trial >= 0 else f"run {run}"
        raise LogError(f"{path}: {what} is there twice, and differs; expected the same line")


def _beginnings(lines: dict[Identity, bytes]) -> dict[str, str]:
    """When the first line of each run was written: sorting is stable within it."""
    began: dict[str, str] = {}
    for (run, _), line in lines.items():
        if run not in began:
            began[run] = decode(line).time
    return began


def _keep_profile(folder: Path, others: Sequence[Path]) -> None:
    """The one beside the logs, by which their work was divided; else the newest of the others."""
    files = [file for each in others if (file := each / DEVICE).is_file()]
    if files and not (folder / DEVICE).is_file():
        DeviceProfile.read(max(files, key=_measured_on)).write(folder / DEVICE)


def _measured_on(file: Path) -> str:
    return DeviceProfile.read(file).date
