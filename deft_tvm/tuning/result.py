"""What tuning says while it runs, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from deft_tvm.device import DeviceProfile
from deft_tvm.tuning.lines import Status
from deft_tvm.tuning.log import TuningLog

Phase = Literal["device", "start", "search", "final", "done"]


@dataclass(frozen=True)
class Progress:
    """One event of a tuning.

    Attributes:
        phase: ``device``: its rates are being measured; ``start``: spaces and worker processes are
            being made; ``search``: a trial has ended; ``final``: the best ones are being measured
            again; ``done``.
        text: the same for people, in a few words.
        trial: trials in the log.
        trials: trials that it shall have.
        spec: of which attention, in ``search`` and ``final``.
        kernel: which one, in ``search`` and ``final``.
        status: how the trial ended.
        best_us: best median of this kernel so far, in µs.
        gain: how many times as fast as the default decision the chosen one is, both in the last
            measurement in turn; None before there was one.
        limit_us: what the kernel cannot be faster than by the device's measured rates.
        failures: trials in the log that did not work, by how they ended.
        seconds_left: of the search, as far as can be told.
    """

    phase: Phase
    text: str
    trial: int = 0
    trials: int = 0
    spec: str = ""
    kernel: str = ""
    status: Status | None = None
    best_us: float | None = None
    gain: float | None = None
    limit_us: float | None = None
    failures: Mapping[str, int] = field(default_factory=dict)
    seconds_left: float | None = None


Listener = Callable[[Progress], None]


def ignore(_: Progress) -> None:
    """The listener that does nothing."""


@dataclass(frozen=True)
class KernelResult:
    """What was found for one kernel.

    Attributes:
        kernel: ``TileShape.name``, or ``merge``.
        workload: whose work items it was timed on.
        decision: the best.
        best_us: its median latency in µs.
        default_us: that of the default decision in the same measurement; None if it failed.
        limit_us: what the launch cannot be faster than by the device's measured rates.
        trials: decisions tried.
        decisions: decisions that there are.
    """

    kernel: str
    workload: str
    decision: Mapping[str, int]
    best_us: float
    default_us: float | None
    limit_us: float
    trials: int
    decisions: int


@dataclass(frozen=True)
class TuningResult:
    """What a tuning found, by kernel.

    Attributes:
        log: where all trials are.
        device: the profile that plans were made by.
        kernels: those for which some decision works.
        new_trials: trials that this call made.
        skipped_lines: lines of the log that could not be read.
        seconds: wall clock.
    """

    log: TuningLog
    device: DeviceProfile
    kernels: Mapping[str, KernelResult]
    new_trials: int
    skipped_lines: int
    seconds: float
