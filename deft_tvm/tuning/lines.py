"""The lines of a tuning log: what one holds, and how old and new ones are read. A leaf.

    {"type":"run", "run":"20261122T003737-17667-9c1e", "device":…, "seed":0, "policy":…, "schema":2}
    {"type":"trial", "run":"20261122T003737-17667-9c1e", "trial":0, "kernel":…, "latency_us":[…], …}

Schema 1 had no ``run`` lines, no ``lost`` trials and no anchors; its lines are read as they are.
"""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from deft_tvm.errors import LogError
from deft_tvm.files import from_json
from deft_tvm.spec import TileShape

#: Version of a line's fields; a reader refuses a newer one.
SCHEMA = 2

Status = Literal["ok", "compile", "runtime", "timeout", "wrong", "refused", "lost"]
#: A time that was measured.
Microseconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=0)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _check_time(text: str) -> None:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"time is {text!r}; expected one with its zone, as in {_now()}")


class Policy(msgspec.Struct, frozen=True):
    """How a run measured.

    Attributes:
        search_seconds: of timing one candidate in the search.
        final_rounds: of the winner's last measurement, all passes together, at least.
        passes: of it at least, between which other kernels are timed.
        cold_bytes: walked before each call, so that no data of the call before is in a cache.
        clock: what takes the time.
        apart: seconds between the beginnings of two passes, at least.
        huge_pages: tensors of a CPU lie in pages of 2 MiB, as far as Linux has them.
    """

    search_seconds: float
    final_rounds: int
    passes: int
    cold_bytes: int
    clock: str = "perf_counter around a call from Python"
    apart: float = 0.0
    huge_pages: bool = False


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One call of the tuner, before its trials: what it ran on, with, and for how long.

    Unknown fields are ignored, as in `Trial`.

    Attributes:
        run: its name, which its trials carry.
        spec: the attention, as ``str(spec)``.
        device: slug.
        name: of the device, as the vendor calls it.
        features: instruction sets, or ``sm_`` architectures.
        driver: of a GPU; empty for a CPU.
        read_bandwidth: bytes per second, measured.
        matrix_rate: FLOP per second by dtype, measured.
        runner: where candidates ran: ``local``, or ``rpc`` with tracker and key.
        workloads: that were asked for.
        trials: budget, None for as many as there are.
        minutes: budget of the search, None for as long as it takes.
        seed: of the search.
        policy: how it measured.
        commit: of the source tree, empty outside one.
        versions: of the packages that matter.
        time: ISO date and time at the beginning.
        type: what kind of line it is.
        schema: version of these fields.
    """

    run: str
    spec: str
    device: str
    name: str
    features: tuple[str, ...]
    read_bandwidth: float
    matrix_rate: dict[str, float]
    policy: Policy
    driver: str = ""
    runner: str = "local"
    workloads: tuple[str, ...] = ()
    trials: int | None = None
    minutes: float | None = None
    seed: int = 0
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    time: str = field(default_factory=_now)
    type: Literal["run"] = "run"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_time(self.time)


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
            the reference; ``lost``: the machine went away, which says nothing of the decision.
        latency_us: µs of each timed launch, raw; empty unless ``ok``.
        anchor_us: in a final measurement what `limit_us` would have been in the same rounds, by
            reading and multiplying beside: where the machine is slow for a minute, both are.
        probe_us: µs of these two probes in each round, by name: ``read`` and ``product``.
        limit_us: what the launch cannot be faster than by the rates in `device.json`.
        compile_s: seconds of compilation, None where there was none.
        max_error: largest absolute difference from the reference; None if it was not compared.
        error: the first lines of what went wrong.
        best_us: lowest median of this kernel and workload so far, this trial included.
        default: the decision that the search started from.
        final: measured again after the search, in turn with the other best ones and the default:
            sample i of each is of the same round.
        alone: final, and measured once more after that, without the others: the one that was
            chosen. What chose it flatters it, and other code between its calls changes them.
        passes: how many of its rounds were made before other kernels had theirs, then how many
            after that, and so on.
        commit: of the source tree, empty outside one.
        versions: of the packages that matter.
        device: slug.
        time: ISO date and time at the end of the trial.
        type: what kind of line it is.
        schema: version of these fields.
    """

    run: str
    trial: Count
    kernel: str
    spec: str
    workload: str
    decision: dict[str, int]
    status: Status
    device: str
    tile: TileShape | None = None
    latency_us: tuple[Microseconds, ...] = ()
    compile_s: float | None = None
    max_error: float | None = None
    anchor_us: tuple[Microseconds, ...] = ()
    probe_us: dict[str, tuple[Microseconds, ...]] = field(default_factory=dict)
    limit_us: Microseconds | None = None
    error: str = ""
    best_us: float | None = None
    default: bool = False
    final: bool = False
    alone: bool = False
    passes: tuple[Count, ...] = ()
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    time: str = field(default_factory=_now)
    type: Literal["trial"] = "trial"
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        _check_time(self.time)
        if self.status == "ok" and not self.latency_us:
            raise ValueError("latency_us is empty; expected a time, as status is 'ok'")

    @property
    def median_us(self) -> float:
        """Median latency in µs; infinite for a trial that failed."""
        return statistics.median(self.latency_us) if self.status == "ok" else float("inf")

    @property
    def identity(self) -> tuple[str, int]:
        """What no other line has, in whatever log."""
        return self.run, self.trial

    @property
    def subject(self) -> tuple[str, str]:
        """What was tuned: only trials with the same kernel and workload can be compared."""
        return self.kernel, self.workload


Line = Run | Trial
_KINDS: dict[str, type[Run] | type[Trial]] = {"run": Run, "trial": Trial}


class _Header(msgspec.Struct):
    schema: int
    type: str = "trial"


def decode(line: bytes) -> Line:
    """One line of any schema up to today's.

    Raises:
        LogError: it is of a newer schema.
        msgspec.MsgspecError: it is damaged.
    """
    header = from_json(line, _Header)
    if header.schema > SCHEMA:
        raise LogError(f"schema is {header.schema}; expected {SCHEMA} or older: update deft_tvm")
    kind = _KINDS.get(header.type)
    if kind is None:
        raise msgspec.ValidationError(f"type is {header.type!r}; expected run or trial")
    return from_json(line, kind)
