"""Where candidates are compiled and timed: machines of one kind that TVM's tracker knows."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tvm import IRModule

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.errors import TuningError
from deft_tvm.manifest import installed_versions
from deft_tvm.tuning.messages import PROFILE_SECONDS, Outcome, Profile, Profiled
from deft_tvm.tuning.process import (
    START_SECONDS,
    RequestFailed,
    Worker,
    WorkerDied,
    WorkerTimeout,
)
from deft_tvm.tuning.runner import COMPILE_LIMIT, RUN_LIMIT, WorkerRunner
from deft_tvm.tuning.subject import Subject
from deft_tvm.tuning.tracker import Address, free_servers, serve_command

REMOTE = "deft_tvm.tuning.remote"
"""Speaks for a server."""

SAME = ("deft_tvm", "tvm")
"""Packages whose versions must agree: what one has scheduled the other compiles."""


class Place(WorkerRunner):
    """The runner on one server of a key, whichever is free; on another one when that goes away.

    Args:
        tracker: that gives it servers.
        key: theirs.
        kind: the device that candidates run on.
        start_seconds: after which there counts as being no server.
        compile_limit, run_limit: as in `WorkerRunner`.
    """

    def __init__(
        self,
        tracker: Address,
        key: str,
        kind: Kind,
        start_seconds: float,
        compile_limit: float,
        run_limit: float,
    ) -> None:
        arguments = (tracker.host, str(tracker.port), key)
        self._key, self._kind = key, kind
        self._worker = Worker("remote", REMOTE, arguments, start_seconds)
        super().__init__([self._worker], self._worker, "", "lost", compile_limit, run_limit)

    @property
    def ready(self) -> bool:
        """It has a server."""
        return self._worker.ready

    def profile(self) -> Profiled:
        """The device of the server that it has.

        Raises:
            TuningError: it gets none, or one that does not answer or has other versions.
        """
        try:
            found = self._worker.ask(Profile(self._kind), Profiled, PROFILE_SECONDS)
        except (RequestFailed, WorkerDied, WorkerTimeout) as error:
            raise TuningError(f"a server of key {self._key!r} tells no device: {error}") from None
        own = installed_versions()
        for package in SAME:
            here, there = own.get(package), found.versions.get(package)
            if here != there:
                raise TuningError(
                    f"a server of key {self._key!r} has {package} {there}; expected {here} as here"
                )
        return found


class Fleet:
    """The runner on all machines that wait under one key of TVM's tracker.

    Each candidate runs on one of them; those that are measured in turn, on the same one. A machine
    that goes away takes its candidate along, whose status is then ``lost``; if it does not come
    back in time, the others go on without it.

    Args:
        tracker: ``HOST:PORT``.
        key: of machines with the same device.
        kind: of their devices, the one that is tuned for.
        start_seconds: after which a machine that went away counts as gone.
        compile_limit, run_limit: as in `WorkerRunner`.

    Attributes:
        name: for the log.
        device: of all machines; the rates are those of one.

    Raises:
        TuningError: the tracker or the machines do not answer, or have different devices.
    """

    def __init__(
        self,
        tracker: str,
        key: str,
        kind: Kind = "cpu",
        start_seconds: float = START_SECONDS,
        compile_limit: float = COMPILE_LIMIT,
        run_limit: float = RUN_LIMIT,
    ) -> None:
        self._tracker, self._key = Address.parse(tracker), key
        self.name = f"rpc {tracker} {key}"
        self._places = [
            Place(self._tracker, key, kind, start_seconds, compile_limit, run_limit)
            for _ in range(free_servers(self._tracker, key))
        ]
        self._changed = threading.Condition()
        self._free: list[Place] = []
        self._devices: dict[str, DeviceProfile] = {}
        self._given_up = ""
        try:
            self.device = self._assemble()
        except BaseException:
            self.close()
            raise

    @property
    def width(self) -> int:
        return len(self._places)

    def time(
        self,
        modules: Sequence[IRModule],
        subject: Subject,
        seconds: float,
        rounds: int | None = None,
    ) -> list[Outcome]:
        """As in `Runner`; from any thread.

        Raises:
            TuningError: no machine is left.
        """
        place = self._take()
        try:
            outcomes = place.time(modules, subject, seconds, rounds)
        except TuningError as error:
            self._give_up(place, error)
            return [Outcome("lost", error=str(error))] * len(modules)
        if place.ready:
            self._give_back(place)
        else:
            self._prepare(place)
        return outcomes

    def renew(self) -> None:
        """Nothing: a server's new process would have to compile everything again."""

    def close(self) -> None:
        with self._changed:
            places, self._places = self._places, []
            self._changed.notify_all()
        for place in places:
            place.close()

    def _assemble(self) -> DeviceProfile:
        """Wait for all machines; what they have in common."""
        for place in tuple(self._places):  # of which one may be given up meanwhile
            self._prepare(place)
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == len(self._places))
        if len(self._devices) > 1:
            raise self._mixed()
        if not self._places:
            raise self._gone()
        (device,) = self._devices.values()
        return device

    def _prepare(self, place: Place) -> None:
        """Free, or given up, once it is known whether it gets a server of the right device."""

        def wait() -> None:
            try:
                found = place.profile().device
            except TuningError as error:
                return self._give_up(place, error)
            except Exception as error:  # a place that is neither free nor given up is waited for
                return self._give_up(place, TuningError(f"{type(error).__name__}: {error}"))
            with self._changed:
                self._devices.setdefault(found.slug, found)
                right = found.slug == next(iter(self._devices))
            return self._give_back(place) if right else self._give_up(place, self._mixed())

        threading.Thread(target=wait, daemon=True).start()

    def _take(self) -> Place:
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self._places)
            if not self._places:
                raise self._gone()
            return self._free.pop()

    def _give_back(self, place: Place) -> None:
        with self._changed:
            self._free.append(place)
            self._changed.notify_all()

    def _give_up(self, place: Place, reason: TuningError) -> None:
        with self._changed:
            if place in self._places:
                self._places.remove(place)
            self._given_up = ": ".join(str(reason).splitlines())
            self._changed.notify_all()
        place.close()

    def _mixed(self) -> TuningError:
        devices = " and ".join(self._devices)
        return TuningError(
            f"servers of key {self._key!r} have different devices: {devices}; expected a key of "
            "its own for each"
        )

    def _gone(self) -> TuningError:
        return TuningError(
            f"no server of key {self._key!r} at {self._tracker} is left ({self._given_up}); start "
            f"one with `{serve_command(self._tracker, self._key)}` and tune again: all finished "
            "trials are in the log"
        )
