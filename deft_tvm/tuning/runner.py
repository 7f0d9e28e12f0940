"""Where candidates are compiled and timed: in processes of their own, so that none ends tuning."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import tvm
from tvm import IRModule

from deft_tvm.tuning.messages import Build, Built, Outcome, Time, Timed, brief
from deft_tvm.tuning.process import RequestFailed, Worker, WorkerDied, WorkerTimeout
from deft_tvm.tuning.subject import Subject

COMPILE_LIMIT = 120.0
RUN_LIMIT = 60.0


class Runner(Protocol):
    """Compiles and times scheduled modules of one function each."""

    def time(self, modules: Sequence[IRModule], subject: Subject, seconds: float) -> list[Outcome]:
        """What comes of each module; those that work are timed in turn, `seconds` in all."""

    def close(self) -> None:
        """Give back what it holds."""


class LocalRunner:
    """The runner on this machine.

    Args:
        compile_limit: seconds after which a compilation counts as hung.
        run_limit: seconds after which checking and timing do, beyond what was asked for.
    """

    def __init__(self, compile_limit: float = COMPILE_LIMIT, run_limit: float = RUN_LIMIT) -> None:
        self.compile_limit, self.run_limit = compile_limit, run_limit
        self._builder, self._timer = Worker("build"), Worker("time")
        self._scratch = tempfile.TemporaryDirectory(prefix="deft-tvm-")
        self._libraries = 0

    def time(self, modules: Sequence[IRModule], subject: Subject, seconds: float) -> list[Outcome]:
        built = [self._build(module, subject) for module in modules]
        libraries = tuple(path for path, _ in built if path)
        symbol = str(modules[0].get_global_vars()[0].name_hint)
        timed = iter(self._time(Time(subject, libraries, symbol, seconds)))
        for library in libraries:
            os.unlink(library)
        return [
            msgspec.structs.replace(next(timed), compile_s=outcome.compile_s) if path else outcome
            for path, outcome in built
        ]

    def close(self) -> None:
        self._builder.close()
        self._timer.close()
        self._scratch.cleanup()

    def _build(self, module: IRModule, subject: Subject) -> tuple[str, Outcome]:
        """Path of the library, empty if there is none, and what is known so far."""
        self._libraries += 1
        path = str(Path(self._scratch.name, f"{self._libraries}.so"))
        request = Build(str(tvm.ir.save_json(module)), subject.device.target(), path)
        try:
            answer = self._builder.ask(request, Built, self.compile_limit)
        except WorkerTimeout as error:
            return "", Outcome("timeout", error=f"compiling: {error}")
        except (WorkerDied, RequestFailed) as error:
            return "", Outcome("compile", error=brief(str(error)))
        return path, Outcome("ok", compile_s=round(answer.seconds, 3))

    def _time(self, request: Time) -> Sequence[Outcome]:
        if not request.libraries:
            return ()
        limit = self.run_limit + request.seconds
        try:
            return self._timer.ask(request, Timed, limit).outcomes
        except WorkerTimeout as error:
            outcome = Outcome("timeout", error=f"running: {error}")
        except (WorkerDied, RequestFailed) as error:
            outcome = Outcome("runtime", error=brief(str(error)))
        return (outcome,) * len(request.libraries)
