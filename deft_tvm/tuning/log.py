"""The tuning log: one JSON line for every trial, and where logs are found. A leaf.

    logs/<device>/device.json                 what the device reaches, as measured
    logs/<device>/<spec>/trials.jsonl         the trials; the truth
    logs/<device>/<spec>/database_*.json      rebuilt from them for MetaSchedule; not shipped
    logs/default-<kind>/decisions.json        default decisions, where there are any

A line is written, flushed and synchronised before the next trial starts, so that a kill at any
moment costs at most the trial that was running. A line that was cut off is skipped and counted, and
the next one begins on a line of its own.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs
from msgspec import field

from deft_tvm import env
from deft_tvm.device import DeviceProfile
from deft_tvm.errors import LogError
from deft_tvm.spec import AttentionSpec, TileShape

#: Version of a line's fields; a reader refuses a newer one.
SCHEMA = 1

TRIALS = "trials.jsonl"
DEVICE = "device.json"

Status = Literal["ok", "compile", "runtime", "timeout", "wrong", "refused"]
AnyPath = str | os.PathLike[str]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that was tried for one kernel on one workload.

    Unknown fields are ignored, so that an older reader takes what a newer writer of the same schema
    has added.

    Attributes:
        run: which call of the tuner; all its lines share it.
        trial: number of the line in its log, from 0.
        kernel: ``TileShape.name``, or ``merge``.
        spec: the attention, as ``str(spec)``.
        workload: the forest whose work items were run, as `workloads.parse` reads it.
        tile: the tile class; None for ``merge``.
        decision: every choice of the schedule, by name.
        status: ``ok``; ``refused``: the schedule declines the decision; ``compile``, ``runtime``:
            an error there, a crash included; ``timeout`` in either; ``wrong``: another result than
            the reference.
        latency_us: µs of each timed launch, raw; empty unless ``ok``.
        compile_s: seconds of compilation, None where there was none.
        max_error: largest absolute difference from the reference; None if it was not compared.
        error: the first lines of what went wrong.
        best_us: lowest median of this kernel and workload so far, this trial included.
        default: the decision that the search started from.
        final: measured again after the search, in turn with the other best ones and the default:
            sample i of each is of the same round.
        commit: of the source tree, empty outside one.
        versions: of the packages that matter.
        device: slug.
        time: ISO date and time at the end of the trial.
        schema: version of these fields.
    """

    run: str
    trial: int
    kernel: str
    spec: str
    workload: str
    decision: dict[str, int]
    status: Status
    device: str
    tile: TileShape | None = None
    latency_us: tuple[float, ...] = ()
    compile_s: float | None = None
    max_error: float | None = None
    error: str = ""
    best_us: float | None = None
    default: bool = False
    final: bool = False
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    time: str = field(default_factory=_now)
    schema: int = SCHEMA

    @property
    def median_us(self) -> float:
        """Median latency in µs; infinite for a trial that failed."""
        return statistics.median(self.latency_us) if self.status == "ok" else float("inf")

    @property
    def subject(self) -> tuple[str, str]:
        """What was tuned: only trials with the same kernel and workload can be compared."""
        return self.kernel, self.workload


class _Header(msgspec.Struct):
    schema: int


@dataclass(frozen=True)
class Reading:
    """The trials of a log, in order.

    Attributes:
        trials: what could be read.
        skipped: lines that could not, since a writer was killed or the file is damaged.
    """

    trials: tuple[Trial, ...]
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

    def append(self, trial: Trial) -> None:
        """Add one line, on the disk when this returns."""
        line = msgspec.json.encode(trial) + b"\n"
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line  # after a line that was cut off
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> Reading:
        """All trials; none if there is no log yet.

        Raises:
            LogError: a line is of a newer schema.
        """
        if not self.exists():
            return Reading((), 0)
        lines = self.path.read_bytes().splitlines()
        trials = tuple(trial for line in lines if (trial := self._decode(line)) is not None)
        return Reading(trials, len([line for line in lines if line]) - len(trials))

    def _decode(self, line: bytes) -> Trial | None:
        try:
            schema = msgspec.json.decode(line, type=_Header).schema
            if schema > SCHEMA:
                raise LogError(
                    f"{self.path}: schema is {schema}; expected {SCHEMA} or older: update deft_tvm"
                )
            return msgspec.json.decode(line, type=Trial)
        except msgspec.MsgspecError:
            return None


def best(log: TuningLog) -> dict[str, Trial]:
    """The winning trial of each kernel.

    Of several workloads that a kernel was tuned on, the one with the most trials speaks.
    """
    fewest_first = sorted(by_subject(log.read()).values(), key=len)
    good = ([trial for trial in trials if trial.status == "ok"] for trials in fewest_first)
    winners = (winner(trials) for trials in good if trials)
    return {trial.kernel: trial for trial in winners}


def by_subject(trials: Iterable[Trial]) -> dict[tuple[str, str], list[Trial]]:
    """Trials by kernel and workload, in order."""
    groups: defaultdict[tuple[str, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.subject].append(trial)
    return dict(groups)


def winner(trials: Sequence[Trial]) -> Trial:
    """The lowest median of the last final measurement, or of all where there was none.

    In a final measurement the default gives way only to what was faster in so many rounds that
    chance explains it in fewer than 2.5 % of cases (sign test, normal approximation).
    """
    final = [trial for trial in trials if trial.final]
    last = [trial for trial in final if trial.run == final[-1].run]
    lowest = min(last or trials, key=lambda trial: trial.median_us)
    default = next((trial for trial in last if trial.default), lowest)
    rounds = list(zip(lowest.latency_us, default.latency_us, strict=False))
    faster = sum(own < other for own, other in rounds)
    return lowest if faster > len(rounds) / 2 + 0.98 * math.sqrt(len(rounds)) else default


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


def find_log(spec: AttentionSpec, device: DeviceProfile) -> TuningLog | None:
    """The first log of `spec` on this very device that is on disk; None if there is none."""
    logs = (TuningLog(root / device.slug / spec.slug) for root in log_roots())
    return next((log for log in logs if log.exists()), None)


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
