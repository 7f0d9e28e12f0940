"""A worker process: started early, asked with a time limit, started again if it dies."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from deft_tvm.errors import TuningError
from deft_tvm.tuning.messages import Answer, Failed, Ready, Request

START_SECONDS = 180.0
"""Imports take two to four seconds; on a machine that others keep busy, far more."""

ERROR_LINES = 8

T = TypeVar("T")


HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Torch asks Linux for pages of 2 MiB. How scattered those of 4 KiB lie depends on what else has
run since the machine started: within twenty minutes a kernel of 64 MiB of KV slowed down by 5 %,
which in huge pages takes 0.82 to 0.92 of that time (AMD EPYC Zen 4, 2026-11-28)."""


class WorkerDied(Exception):
    """The worker ended in the middle of a request; what it said last."""


class WorkerTimeout(Exception):
    """The worker did not answer in time and was killed."""


class RequestFailed(Exception):
    """The worker raised an exception; its text."""


class Worker:
    """One process that answers one request at a time.

    It is started at once and imports in the background; only the first request waits for that.

    Args:
        role: what it does, in a word, for errors.
        module: that Python runs as the process; by default `worker`, with `role` as its argument.
        arguments: of the module.
        start_seconds: after which a process that is not ready counts as one that cannot start.

    Attributes:
        ready: it has imported what it needs, as far as was waited for.
    """

    def __init__(
        self,
        role: str,
        module: str = "deft_tvm.tuning.worker",
        arguments: Sequence[str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.role, self.start_seconds = role, start_seconds
        self._command = (sys.executable, "-m", module, *(arguments or (role,)))
        self._closed, self._asking = False, threading.RLock()
        # Linux ends a process with the thread that started it, see `child.end_with_parent`; one
        # that asks may end long before.
        self._starter = ThreadPoolExecutor(1, "deft-tvm-starter")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._errors.seek(0)
        self._errors.truncate()
        self.ready = False
        self._process = self._starter.submit(
            subprocess.Popen,
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path, **HUGE_PAGES},
            start_new_session=True,
        ).result()

    def wait_until_ready(self) -> None:
        """Wait for its imports.

        Raises:
            TuningError: it cannot start.
        """
        with self._asking:
            if self.ready:
                return
            try:
                self._receive(Ready, self.start_seconds)
            except (WorkerDied, WorkerTimeout, RequestFailed) as error:
                raise TuningError(f"the {self.role} process did not start: {error}") from None
            self.ready = True

    def ask(self, request: Request, answer: type[T], seconds: float) -> T:
        """The answer to `request`, if it comes within `seconds`.

        Raises:
            RequestFailed: the worker raised an exception.
            WorkerDied: it ended without an answer; another one has been started.
            WorkerTimeout: it did not answer and was killed; another one has been started.
            TuningError: it cannot start.
        """
        with self._asking:
            self.wait_until_ready()
            try:
                self._send(request)
                return self._receive(answer, seconds)
            except RequestFailed:
                raise
            except BaseException:  # an answer may yet come, which would be taken for the next one
                if not self._closed:
                    self._end()
                    self._start()
                raise

    def restart(self) -> None:
        """End the process and start another one, which imports in the background."""
        with self._asking:
            if not self._closed:
                self._end()
                self._start()

    def close(self) -> None:
        """End the process, whatever it is doing; a thread that waits for it gets WorkerDied."""
        self._closed = True
        self._kill()
        with self._asking:
            self._end()
        self._starter.shutdown(wait=False)

    def _end(self) -> None:
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):  # another thread has just waited for it
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, request: Request) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(self._last_words()) from None

    def _receive(self, expected: type[T], seconds: float) -> T:
        line = self._line(seconds)
        try:
            answer: Answer = msgspec.json.decode(line, type=Answer)
        except msgspec.MsgspecError as error:
            raise WorkerDied(f"an answer that cannot be read: {error}") from None
        if isinstance(answer, Failed):
            raise RequestFailed(answer.error)
        if not isinstance(answer, expected):
            raise WorkerDied(f"it answered {type(answer).__name__}; expected {expected.__name__}")
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        stream, deadline, line = self._process.stdout.fileno(), time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise WorkerTimeout(f"no answer within {seconds:.0f} s")
            part = os.read(stream, 1 << 16)
            if not part:
                raise WorkerDied(self._last_words())
            line += part
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return "\n".join([f"the process ended with {how}", *said[-ERROR_LINES:]])
