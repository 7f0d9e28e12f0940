"""What the tuner asks its worker processes, and what they answer: lines of JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.tuning.lines import Status
from deft_tvm.tuning.subject import Subject

ERROR_PART = 400

ASK, ANSWER = "deft_tvm.ask", "deft_tvm.answer"
"""Names of the functions by which a server of a fleet takes a request and gives its answer."""


class Build(msgspec.Struct, frozen=True, tag=True):
    """Compile a scheduled module, in TVM's JSON, into a library at `path`.

    A relative path, here and in `Time`, lies in the worker's own folder.
    """

    module: str
    target: dict[str, Any]
    path: str


class Time(msgspec.Struct, frozen=True, tag=True):
    """Run one function of each of some libraries on a subject's arguments: check it, then time it.

    Attributes:
        subject: makes the arguments.
        libraries: paths; they are timed in turn.
        function: the symbol.
        seconds: to spend on timing all of them.
        rounds: of one pass of the last measurement, no more than these: on new tensors, and beside
            them, in the same rounds, a large sum and a matrix product, which limit the launch. None
            in the search.
    """

    subject: Subject
    libraries: tuple[str, ...]
    function: str
    seconds: float
    rounds: int | None = None


class Profile(msgspec.Struct, frozen=True, tag=True):
    """Tell what this machine's CPU or GPU is and reaches, measured the first time and kept."""

    kind: Kind = "cpu"


PROFILE_SECONDS = 120.0
"""Seconds after which a machine counts as one that cannot be measured."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has imported what it needs."""


class Built(msgspec.Struct, frozen=True, tag=True):
    """A library is there; it took so many seconds."""

    seconds: float


class Profiled(msgspec.Struct, frozen=True, tag=True):
    """The device, and versions of the packages that matter where it is."""

    device: DeviceProfile
    versions: dict[str, str]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request raised an exception; its text."""

    error: str


class Outcome(msgspec.Struct, frozen=True):
    """What came of one candidate: the fields of a `Trial` that are measured."""

    status: Status
    latency_us: tuple[float, ...] = ()
    anchor_us: tuple[float, ...] = ()
    probe_us: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    compile_s: float | None = None
    max_error: float | None = None
    error: str = ""


class Timed(msgspec.Struct, frozen=True, tag=True):
    """What running each library gave."""

    outcomes: tuple[Outcome, ...]


def brief(error: str) -> str:
    """The beginning and the end of an error: TVM prints whole modules in between."""
    if len(error) <= 2 * ERROR_PART:
        return error
    return f"{error[:ERROR_PART]} … {error[-ERROR_PART:]}"


Request = Build | Time | Profile
Answer = Ready | Built | Timed | Profiled | Failed
