"""The tuning log: one JSON line for every run and trial, and where logs are found. A leaf.

    logs/<device>/device.json                 what the device reaches, as measured
    logs/<device>/<spec>/trials.jsonl         the trials; the truth
    logs/<device>/<spec>/database_*.json      rebuilt from them for MetaSchedule; not shipped
    logs/default-<kind>/decisions.json        default decisions, where there are any

A line is written, flushed and synchronised as soon as its trial has ended, so that a kill at any
moment costs at most the trials that were running. A line that was cut off is skipped and counted,
and the next one begins on a line of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import filelock
import msgspec
import platformdirs

from deft_tvm import env
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError, TuningError
from deft_tvm.files import AnyPath, append_line
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.lines import Line, Run, Trial, decode

TRIALS = "trials.jsonl"
DEVICE = "device.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Reading:
    """What a log holds, in order.

    Attributes:
        trials: those that could be read.
        runs: of which they are, by name; those of schema 1 have none.
        skipped: lines that could not be read, since a writer was killed or the file is damaged.
    """

    trials: tuple[Trial, ...]
    runs: dict[str, Run]
    skipped: int

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)


class TuningLog:
    """The log in one folder, of one spec on one device. The folder need not exist."""

    def __init__(self, directory: AnyPath) -> None:
        self.directory = Path(directory)
        self.path = self.directory / TRIALS

    def __repr__(self) -> str:
        return f"TuningLog({str(self.directory)!r})"

    def exists(self) -> bool:
        return self.path.is_file()

    def append(self, line: Line) -> None:
        """Add one line, on the disk when this returns.

        Raises:
            LogError: it cannot be written; what was in the log before still is.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            append_line(self.path, msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise LogError(
                f"{self.path} cannot be written: {error.strerror}; all that was in it before still "
                "is, and the same command goes on from there"
            ) from error

    def read(self) -> Reading:
        """All of it; nothing if there is no log yet.

        Raises:
            LogError: a line is of a newer schema, or the file cannot be read.
        """
        found = list(self._lines())
        trials = tuple(line for line in found if isinstance(line, Trial))
        runs = {line.run: line for line in found if isinstance(line, Run)}
        return Reading(trials, runs, found.count(None))

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Nobody else writes it within; a process that ends gives it back.

        Raises:
            TuningError: somebody else does.
            LogError: the folder cannot be written.
        """
        lock = filelock.FileLock(self.directory / LOCK)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise TuningError(
                f"another tuning writes {self.directory}; wait for it, or name another folder"
            ) from None
        except OSError as error:
            raise LogError(
                f"{self.directory} cannot be written: {error.strerror}; expected a folder that can"
            ) from error
        try:
            for scratch in self.directory.glob(f".{TRIALS}-*"):
                scratch.unlink(missing_ok=True)  # of a merge that was killed
            yield
        finally:
            lock.release()

    def _lines(self) -> Iterator[Line | None]:
        """Each line; None for one that is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise LogError(f"{self.path} cannot be read: {error.strerror}") from error
        for line in filter(None, content.splitlines()):
            try:
                yield decode(line)
            except msgspec.MsgspecError:
                yield None
            except LogError as error:
                raise LogError(f"{self.path}: {error}") from None


def best(log: TuningLog) -> dict[str, Trial]:
    """The winning trial of each kernel.

    Of several workloads that a kernel was tuned on, the one with the most trials speaks.
    """
    fewest_first = sorted(by_subject(log.read()).values(), key=len)
    good = ([trial for trial in trials if trial.status == "ok"] for trials in fewest_first)
    winners = (winner(trials) for trials in good if trials)
    return {trial.kernel: trial for trial in winners}


def best_of(logs: Iterable[TuningLog]) -> dict[str, tuple[TuningLog, Trial]]:
    """The winning trial of each kernel in logs of one spec on one device, and which log has it.

    The first log speaks in which the kernel was measured again after the search; where that is in
    none, the first in which it worked. A tuning that was stopped has a few trials of some kernels,
    and the best of them looks better than it is: it hides no log that was finished.
    """
    found: dict[str, tuple[TuningLog, Trial]] = {}
    for log in logs:
        for kernel, trial in best(log).items():
            if kernel not in found or (trial.final and not found[kernel][1].final):
                found[kernel] = log, trial
    return found


def by_subject(trials: Iterable[Trial]) -> dict[tuple[str, str], list[Trial]]:
    """Trials by kernel and workload, in order."""
    groups: defaultdict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.subject].append(trial)
    return dict(groups)


def winner(trials: Sequence[Trial]) -> Trial:
    """The chosen one as it was measured alone in the last run; as it was chosen without that."""
    alone = [trial for trial in last_measurement(trials) if trial.alone]
    return alone[-1] if alone else chosen(trials)


def last_measurement(trials: Iterable[Trial]) -> list[Trial]:
    """Final trials of the last run that made any."""
    final = [trial for trial in trials if trial.final]
    return [trial for trial in final if trial.run == final[-1].run]


def rivals(trials: Sequence[Trial]) -> Sequence[Trial]:
    """What was last measured in turn; alone where there was one of them, all without either."""
    last = last_measurement(trials)
    return [trial for trial in last if not trial.alone] or last or trials


def chosen(trials: Sequence[Trial]) -> Trial:
    """The lowest median of `rivals`.

    In a last measurement the default gives way only to what was faster in so many rounds that, if
    rounds were independent, chance would explain it in fewer than 2.5 % of cases, divided among its
    rivals (sign test, normal approximation).
    """
    last = rivals(trials)
    lowest = min(last, key=lambda trial: trial.median_us)
    default = next((trial for trial in last if trial.default and trial.final), lowest)
    rounds = list(zip(lowest.latency_us, default.latency_us, strict=False))
    faster = sum(own < other for own, other in rounds)
    sure = NormalDist().inv_cdf(1 - 0.025 / max(1, len(last) - 1))
    return lowest if faster > (len(rounds) + sure * math.sqrt(len(rounds))) / 2 else default


def log_folders(path: AnyPath) -> list[Path]:
    """Folders of logs: `path` itself, or those up to two folders below it.

    Raises:
        LogError: there is no such folder.
    """
    root = Path(path)
    if root.name == TRIALS and root.is_file():
        return [root.parent]
    if not root.is_dir():
        raise LogError(f"{path} is no folder; expected a tuning log, or a device's logs")
    files = (
        file for pattern in (".", "*", "*/*") for file in sorted(root.glob(f"{pattern}/{TRIALS}"))
    )
    return [file.parent for file in files]


def log_roots() -> list[Path]:
    """Folders that hold logs, in the order in which they are asked: the user's before shipped."""
    named = env.LOGS.get()
    return [*([named] if named else []), user_logs(), *shipped_logs()]


def user_logs() -> Path:
    """The user's own logs."""
    return platformdirs.user_data_path("deft_tvm", appauthor=False) / "logs"


def shipped_logs() -> list[Path]:
    """Logs in an installed package, and in a checkout."""
    package = Path(__file__).parents[1]
    return [package / "logs", package.parent / "logs"]


def writable_root(root: AnyPath | None = None) -> Path:
    """Where new logs go: `root`, else ``DEFT_TVM_LOGS``, else the user's own."""
    return Path(root) if root is not None else env.LOGS.get() or user_logs()


def find_logs(spec: AttentionSpec, device: DeviceProfile) -> list[TuningLog]:
    """The logs of `spec` on this very device, in the order of `log_roots`."""
    logs = (TuningLog(root / device.slug / spec.slug) for root in log_roots())
    return [log for log in logs if log.exists()]


def measured(device: DeviceProfile) -> DeviceProfile:
    """`device` with its rates as measured where a log has them, else as it is."""
    files = (root / device.slug / DEVICE for root in log_roots())
    found = next((DeviceProfile.read(file) for file in files if file.is_file()), device)
    return msgspec.structs.replace(
        device,
        read_bandwidth=found.read_bandwidth,
        matrix_rate=found.matrix_rate,
        launch_seconds=found.launch_seconds,
        measured=found.measured,
        date=found.date,
    )


def logs_of(folders: Iterable[Path]) -> Iterator[TuningLog]:
    """All logs in a device's folders, one folder after the other."""
    for folder in folders:
        for file in sorted(folder.glob(f"*/{TRIALS}")):
            yield TuningLog(file.parent)


def device_logs(folders: Iterable[Path]) -> dict[str, list[TuningLog]]:
    """The logs in a device's folders by their spec's slug, those of the first folder first."""
    found: defaultdict[str, list[TuningLog]] = defaultdict(list)
    for log in logs_of(folders):
        found[log.directory.name].append(log)
    return dict(found)


def logged_spec(logs: Sequence[TuningLog]) -> AttentionSpec:
    """What was tuned in logs of one spec, as the first line says that can be read.

    Raises:
        LogError: no line tells.
    """
    for found in (log.read() for log in logs):
        for line in (*found, *found.runs.values()):
            return AttentionSpec.parse(line.spec)
    path = logs[0].path
    raise LogError(f"{path} has no line that can be read; expected one that names its spec")
