"""Where candidates are compiled and timed: in processes of their own, so that none ends tuning."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
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

KEPT_LIBRARIES = 64
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
        self, modules: Sequence[IRModule], subject: Subject, seconds: float, anchored: bool = False
    ) -> list[Outcome]:
        """What comes of each module; those that work are timed in turn, `seconds` in all.

        Args:
            anchored: time beside them what limits the launch, see `messages.Time`.
        """

    def close(self) -> None:
        """Give back what it holds."""


class WorkerRunner:
    """A runner on a process that compiles and one that times, which may be the same.

    Args:
        builder: answers `Build`.
        timer: answers `Time`, and reads what the builder wrote.
        directory: theirs, for libraries; empty: they have one of their own.
        died: status of a candidate during which a process ended; by default an error of what was
            being done.
        compile_limit: seconds after which a compilation counts as hung.
        run_limit: seconds after which checking and timing do, beyond what was asked for.
    """

    name, width = "local", 1

    def __init__(
        self,
        builder: Worker,
        timer: Worker,
        directory: str,
        died: Status | None = None,
        compile_limit: float = COMPILE_LIMIT,
        run_limit: float = RUN_LIMIT,
    ) -> None:
        self.compile_limit, self.run_limit = compile_limit, run_limit
        self._builder, self._timer, self._directory, self._died = builder, timer, directory, died
        self._built: dict[str, tuple[str, Outcome]] = {}
        self._libraries = 0

    def time(
        self, modules: Sequence[IRModule], subject: Subject, seconds: float, anchored: bool = False
    ) -> list[Outcome]:
        built = [self._build(module, subject) for module in modules]
        libraries = tuple(path for path, outcome in built if outcome.status == "ok")
        symbol = str(modules[0].get_global_vars()[0].name_hint)
        found = self._time(Time(subject, libraries, symbol, seconds, anchored))
        if isinstance(found, Outcome) and len(modules) > 1:  # who is to blame?
            each = seconds / len(modules)
            return [self.time([module], subject, each, anchored)[0] for module in modules]
        timed = iter([found] if isinstance(found, Outcome) else found)
        return [
            msgspec.structs.replace(next(timed), compile_s=outcome.compile_s)
            if outcome.status == "ok"
            else outcome
            for _, outcome in built
        ]

    def close(self) -> None:
        self._builder.close()
        self._timer.close()

    def _build(self, module: IRModule, subject: Subject) -> tuple[str, Outcome]:
        """Path of the library, and what is known so far; one that is there is not made again."""
        text, target = str(tvm.ir.save_json(module)), subject.device.target()
        key = sha256(text.encode() + msgspec.json.encode(target)).hexdigest()
        if key in self._built:
            return self._built[key]
        self._libraries += 1
        path = str(Path(self._directory, f"{self._libraries}.so"))
        outcome = self._answered(
            "compiling",
            "compile",
            lambda: self._builder.ask(Build(text, target, path), Built, self.compile_limit),
        )
        if isinstance(outcome, Outcome):
            return path, outcome
        self._built[key] = path, Outcome("ok", compile_s=round(outcome.seconds, 3))
        if len(self._built) > KEPT_LIBRARIES:
            oldest, _ = self._built.pop(next(iter(self._built)))
            if self._directory:  # otherwise it lies on another machine, and goes with the session
                with suppress(OSError):
                    os.unlink(oldest)
        return self._built[key]

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
        self._built.clear()  # what a process has built may have gone with it
        return Outcome(status, error=text)


class LocalRunner(WorkerRunner):
    """The runner on this machine: compiling does not disturb the process that times.

    Args:
        compile_limit, run_limit: as in `WorkerRunner`.
    """

    def __init__(self, compile_limit: float = COMPILE_LIMIT, run_limit: float = RUN_LIMIT) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="deft-tvm-")
        super().__init__(
            Worker("build"),
            Worker("time"),
            self._scratch.name,
            compile_limit=compile_limit,
            run_limit=run_limit,
        )

    def close(self) -> None:
        super().close()
        self._scratch.cleanup()
