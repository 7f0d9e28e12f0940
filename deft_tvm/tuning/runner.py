"""Where candidates are compiled and timed: in processes of their own, so that none ends tuning."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

import msgspec
import tvm
from tvm import IRModule

from deft_tvm.tuning.lines import Status
from deft_tvm.tuning.messages import Build, Built, Outcome, Time, Timed, brief
from deft_tvm.tuning.process import RequestFailed, Worker, WorkerDied, WorkerTimeout
from deft_tvm.tuning.subject import Subject

T = TypeVar("T")

COMPILE_LIMIT = 120.0
RUN_LIMIT = 60.0

KEPT_LIBRARIES = 512
"""So many finalists are measured pass after pass without compiling them again."""


class Runner(Protocol):
    """Compiles and times scheduled modules of one function each.

    Attributes:
        name: what the log says of it: ``local``, or ``rpc`` with tracker and key.
        width: calls of `time` that go on at once, from a thread each.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def time(
        self,
        modules: Sequence[IRModule],
        subject: Subject,
        seconds: float,
        rounds: int | None = None,
    ) -> list[Outcome]:
        """What comes of each module; those that work are timed in turn, `seconds` in all.

        Args:
            rounds: of a pass of the last measurement, see `messages.Time`.
        """

    def renew(self) -> None:
        """Time in a new process from now on, where that does not cost what was compiled."""

    def close(self) -> None:
        """Give back what it holds."""


class WorkerRunner:
    """A runner on processes that compile and one that times, which may be the same.

    Only one request is timed at a time, and as many candidates are compiled as there are builders.

    Args:
        builders: answer `Build`.
        timer: answers `Time`, and reads what the builder wrote.
        directory: theirs, for libraries; empty: they have one of their own.
        died: status of a candidate during which a process ended; by default an error of what was
            being done.
        compile_limit: seconds after which a compilation counts as hung.
        run_limit: seconds after which checking and timing do, beyond what was asked for.
    """

    name = "local"

    def __init__(
        self,
        builders: Sequence[Worker],
        timer: Worker,
        directory: str,
        died: Status | None = None,
        compile_limit: float = COMPILE_LIMIT,
        run_limit: float = RUN_LIMIT,
    ) -> None:
        self.compile_limit, self.run_limit = compile_limit, run_limit
        self._timer, self._directory, self._died = timer, directory, died
        self._builders, self._free = tuple(builders), SimpleQueue[Worker]()
        for builder in builders:
            self._free.put(builder)
        self._pool = ThreadPoolExecutor(len(builders), "deft-tvm-build")
        self._changing = threading.Lock()
        self._built: dict[str, tuple[str, Outcome]] = {}
        self._libraries = 0

    @property
    def width(self) -> int:
        return len(self._builders)

    def time(
        self,
        modules: Sequence[IRModule],
        subject: Subject,
        seconds: float,
        rounds: int | None = None,
    ) -> list[Outcome]:
        built = list(self._pool.map(lambda module: self._build(module, subject), modules))
        libraries = tuple(path for path, outcome in built if outcome.status == "ok")
        symbol = str(modules[0].get_global_vars()[0].name_hint)
        found = self._time(Time(subject, libraries, symbol, seconds, rounds))
        if isinstance(found, Outcome) and len(modules) > 1:  # who is to blame?
            each = seconds / len(modules)
            return [self.time([module], subject, each, rounds)[0] for module in modules]
        timed = iter([found] if isinstance(found, Outcome) else found)
        return [
            msgspec.structs.replace(next(timed), compile_s=outcome.compile_s)
            if outcome.status == "ok"
            else outcome
            for _, outcome in built
        ]

    def close(self) -> None:
        for worker in (*self._builders, self._timer):
            worker.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _build(self, module: IRModule, subject: Subject) -> tuple[str, Outcome]:
        """Path of the library, and what is known so far; one that is there is not made again."""
        text, target = str(tvm.ir.save_json(module)), subject.device.target()
        key = sha256(text.encode() + msgspec.json.encode(target)).hexdigest()
        with self._changing:
            if key in self._built:
                return self._built[key]
            self._libraries += 1
            path = str(Path(self._directory, f"{self._libraries}.so"))
        request, builder = Build(text, target, path), self._free.get()
        try:
            outcome = self._answered(
                "compiling", "compile", lambda: builder.ask(request, Built, self.compile_limit)
            )
        finally:
            self._free.put(builder)
        if isinstance(outcome, Outcome):
            return path, outcome
        found = path, Outcome("ok", compile_s=round(outcome.seconds, 3))
        with self._changing:
            self._built[key] = found
            oldest = next(iter(self._built)) if len(self._built) > KEPT_LIBRARIES else None
            forgotten = None if oldest is None else self._built.pop(oldest)[0]
        if forgotten and self._directory:  # otherwise it lies on another machine, and goes with it
            with suppress(OSError):
                os.unlink(forgotten)
        return found

    def _time(self, request: Time) -> Sequence[Outcome] | Outcome:
        """What came of each library, or of the process that was to time them all."""
        if not request.libraries:
            return ()
        limit = self.run_limit + request.seconds
        timed = self._answered("running", "runtime", lambda: self._timer.ask(request, Timed, limit))
        return timed if isinstance(timed, Outcome) else timed.outcomes

    def _answered(self, doing: str, failed: Status, ask: Callable[[], T]) -> T | Outcome:
        """The answer, or what it says of the candidate that there is none."""
        try:
            return ask()
        except RequestFailed as error:
            return Outcome(failed, error=brief(str(error)))
        except WorkerTimeout as error:
            status: Status = "timeout"
            text = f"{doing}: {error}"
        except WorkerDied as error:
            status, text = self._died or failed, brief(str(error))
        with self._changing:
            self._built.clear()  # what a process has built may have gone with it
        return Outcome(status, error=text)


class LocalRunner(WorkerRunner):
    """The runner on this machine: compiling does not disturb the process that times.

    Args:
        builders: processes that compile at once. On a CPU more than one would take the cores from
            the candidate that is being timed.
    """

    def __init__(self, builders: int = 1) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="deft-tvm-")
        super().__init__(
            [Worker("build") for _ in range(builders)],
            Worker("time"),
            self._scratch.name,
        )

    def renew(self) -> None:
        self._timer.restart()

    def close(self) -> None:
        super().close()
        self._scratch.cleanup()
