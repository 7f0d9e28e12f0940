"""Logs by path: what was measured of each kernel, and in which surroundings."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from deft_tvm.compare.statistics import LIMIT, Samples
from deft_tvm.errors import LogError
from deft_tvm.files import AnyPath
from deft_tvm.tuning.lines import Run, Trial
from deft_tvm.tuning.log import (
    TuningLog,
    by_subject,
    chosen,
    log_folders,
    rivals,
    winner,
)


class Subject(NamedTuple):
    """What is compared: one kernel of one attention on the work of one tree."""

    spec: str
    kernel: str
    workload: str


@dataclass(frozen=True)
class Tuned:
    """What a log says of one subject.

    Attributes:
        subject: which.
        log: the folder.
        trials: all, in order.
        runs: of these trials, by name; not those of schema 1.
    """

    subject: Subject
    log: Path
    trials: tuple[Trial, ...]
    runs: Mapping[str, Run]

    @cached_property
    def good(self) -> list[Trial]:
        """Trials that worked."""
        return [trial for trial in self.trials if trial.status == "ok"]

    @cached_property
    def best(self) -> Trial | None:
        """The winner, as modules are built with it; None if nothing worked."""
        return winner(self.good) if self.good else None

    @property
    def in_turn(self) -> tuple[Trial, Trial] | None:
        """The winner and the default as they were measured in turn; None if they were not."""
        default = next((t for t in rivals(self.good) if t.default and t.final), None)
        return None if default is None else (chosen(self.good), default)

    @property
    def final(self) -> bool:
        """The winner was measured again after the search."""
        return self.best is not None and self.best.final

    @property
    def limits(self) -> tuple[float, ...] | None:
        """µs of the limit in each round of the winner, as it was measured just then if it was."""
        best = self.best
        if best is None:
            return None
        if len(best.anchor_us) == len(best.latency_us):
            return best.anchor_us
        return (best.limit_us,) * len(best.latency_us) if best.limit_us else None

    @property
    def limit_share(self) -> float | None:
        """Of the winner's time, what the device's limit would take."""
        if self.best is None or self.limits is None:
            return None
        pairs = zip(self.limits, self.best.latency_us, strict=True)
        return statistics.median(limit / own for limit, own in pairs)

    @property
    def samples(self) -> Samples:
        """Of the winner, in µs, and what was timed in the same rounds."""
        assert self.best is not None
        beside = {**self.best.probe_us, LIMIT: self.best.anchor_us}
        return Samples.of(self.best.latency_us, self.best.passes, beside)

    @property
    def command(self) -> str:
        """What measures the winner again."""
        parts = ("--kernel", self.subject.kernel, "--workload", self.subject.workload)
        return shlex.join(("deft-tvm", "log", "measure", str(self.log), "--into", "again", *parts))


@dataclass(frozen=True)
class Surroundings:
    """What times depend on beside the kernels; equal ones can be compared.

    Attributes:
        device: slug.
        name: of the device, where a log tells it.
        features: instruction sets, where a log tells them.
        driver: of a GPU.
        versions: of the packages that have a part in it.
        measured: how, in words.
        runner: where candidates ran.
    """

    device: str
    name: str
    features: tuple[str, ...]
    driver: str
    versions: tuple[tuple[str, str], ...]
    measured: str
    runner: str


@dataclass(frozen=True)
class Source:
    """All logs under one path, of one device.

    Attributes:
        label: the path as it was given.
        tuned: by subject.
        runs: of all trials, in order of time.
        skipped: lines that could not be read.
    """

    label: str
    tuned: Mapping[Subject, Tuned]
    runs: tuple[Run, ...]
    skipped: int

    @classmethod
    def read(cls, path: AnyPath) -> Source:
        """The log in a folder, or all logs of a device in a folder of folders.

        Raises:
            LogError: there is none, there are several devices', or one cannot be read.
        """
        found: dict[Subject, Tuned] = {}
        runs: dict[str, Run] = {}
        devices: set[str] = set()
        skipped = 0
        for folder in log_folders(path):
            reading = TuningLog(folder).read()
            skipped += reading.skipped
            runs |= reading.runs
            devices |= {trial.device for trial in reading}
            for (kernel, workload), trials in by_subject(reading).items():
                subject = Subject(trials[0].spec, kernel, workload)
                if subject in found and len(devices) == 1:
                    raise LogError(
                        f"{path} has two logs of {subject.spec}, {found[subject].log} and {folder};"
                        " expected one: `deft-tvm log merge` makes one of them"
                    )
                found[subject] = Tuned(subject, folder, tuple(trials), reading.runs)
        if not found:
            raise LogError(f"{path} has no trial in it; expected a tuning log, or a device's logs")
        if len(devices) > 1:
            raise LogError(
                f"{path} has logs of {', '.join(sorted(devices))}; expected one device's folder"
            )
        ordered = sorted(runs.values(), key=lambda run: run.time)
        return cls(str(path), found, tuple(ordered), skipped)

    @cached_property
    def trials(self) -> list[Trial]:
        return [trial for tuned in self.tuned.values() for trial in tuned.trials]

    @property
    def device(self) -> str:
        return self.trials[0].device

    @cached_property
    def surroundings(self) -> Surroundings:
        """Of the last run that measured a winner."""
        last = max((t.best for t in self.tuned.values() if t.best), key=_time, default=None)
        last = last or max(self.trials, key=_time)
        run = next((run for run in self.runs if run.run == last.run), None)
        policy = run.policy if run else None
        measured = (
            f"{policy.final_rounds} rounds in {policy.passes} passes, {policy.apart:g} s apart, "
            f"{policy.cold_bytes >> 20} MiB walked before each, {policy.clock}"
            + (", huge pages" if policy.huge_pages else "")
            if policy
            else "not told"
        )
        return Surroundings(
            device=last.device,
            name=run.name if run else "",
            features=run.features if run else (),
            driver=run.driver if run else "",
            versions=tuple(sorted(last.versions.items())),
            measured=measured,
            runner=run.runner if run else "",
        )


def _time(trial: Trial) -> str:
    return trial.time
