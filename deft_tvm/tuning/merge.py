"""Logs of several machines as one: every line of each, once, in the order of their runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.files import write_whole
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.lines import Line, Run, Trial, decode
from deft_tvm.tuning.log import DEVICE, TRIALS, AnyPath, TuningLog, log_folders

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
        skipped: damaged lines of the sources.
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
            newer schema.
        TuningError: a tuning writes a log that would have to be changed.
    """
    folders = [folder for path in paths for folder in _some(path)]
    by_place: dict[Path, list[Path]] = {}
    for folder in folders:
        trial = _first_trial(folder)
        place = Path(into, trial.device, AttentionSpec.parse(trial.spec).slug)
        by_place.setdefault(place, []).append(folder)
    return [_merge(TuningLog(place), sources) for place, sources in by_place.items()]


def _some(path: AnyPath) -> list[Path]:
    found = log_folders(path)
    if not found:
        raise LogError(f"{path} has no log in it; expected a tuning log, or folders of them")
    return found


def _first_trial(folder: Path) -> Trial:
    trial = next(iter(TuningLog(folder).read()), None)
    if trial is None:
        raise LogError(f"{folder} has no trial that can be read")
    return trial


def _merge(log: TuningLog, sources: Sequence[Path]) -> Merged:
    with log.only_writer():
        kept, _ = _lines([log.directory] if log.exists() else [])
        found, skipped = _lines(sources)
        both = {**kept, **found}
        for identity in kept.keys() & found.keys():
            _check_equal(identity, kept[identity], found[identity], log.path)
        ordered = sorted(both.items(), key=lambda pair: _began(both, pair[0][0]))
        write_whole(log.path, b"".join(line + b"\n" for _, line in ordered))
        _keep_profile(log.directory.parent, [source.parent for source in sources])
    return Merged(log, tuple(sources), len(both), len(both) - len(kept), skipped)


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


def _began(lines: dict[Identity, bytes], run: str) -> tuple[str, str]:
    """When a run's first line was written, and its name: sorting is stable within it."""
    first = next(line for (name, _), line in lines.items() if name == run)
    return decode(first).time, run


def _keep_profile(folder: Path, others: Sequence[Path]) -> None:
    """The newest measured profile of the device, beside its logs."""
    files = [file for each in (folder, *others) if (file := each / DEVICE).is_file()]
    if files:
        DeviceProfile.read(max(files, key=_measured_on)).write(folder / DEVICE)


def _measured_on(file: Path) -> str:
    return DeviceProfile.read(file).date
