"""A device machine of a fleet: TVM's RPC server, whose sessions answer what workers answer.

    a tuner's `remote` ─── TVM's RPC ──▶ a process that TVM's server forks: `Session`
                                           ├─ worker build
                                           └─ worker time

What may crash or hang does so in the workers, as on the tuner's own machine, and neither ends a
session nor the server.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from typing import NoReturn

import msgspec
import psutil
import tvm_ffi
from tvm.rpc.server import PopenRPCServerState

from deft_tvm.device import DeviceProfile
from deft_tvm.errors import TuningError
from deft_tvm.tuning.child import end_with_parent
from deft_tvm.tuning.messages import (
    ANSWER,
    ASK,
    PROFILE_SECONDS,
    Build,
    Failed,
    Profile,
    Profiled,
    Ready,
    Request,
)
from deft_tvm.tuning.process import RequestFailed, Worker, WorkerDied, WorkerTimeout
from deft_tvm.tuning.tracker import Address

POLL_SECONDS = 0.5
"""So often a session looks whether its client is still there."""

NO_LIMIT = 86400.0
"""The client knows how long a request may take, and ends the session."""


def device_here() -> DeviceProfile:
    """This machine's CPU as its workers see it, measured if it never was.

    In a process of its own: see `serve`.

    Raises:
        TuningError: it cannot be measured.
    """
    worker = Worker("time")
    try:
        return worker.ask(Profile(), Profiled, PROFILE_SECONDS).device
    except (RequestFailed, WorkerDied, WorkerTimeout) as error:
        raise TuningError(f"this machine cannot be measured: {error}") from None
    finally:
        worker.close()


class Session:
    """What one client asks, and its answers; the first, unasked, is that the workers are ready.

    Its folder is the one that TVM makes for a session and removes with it.
    """

    def __init__(self) -> None:
        end_with_parent()
        # TVM prints a traceback when a client has gone away.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self._requests: SimpleQueue[str] = SimpleQueue()
        self._answers: SimpleQueue[msgspec.Struct] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def ask(self, request: str) -> None:
        """Begin with a request, as a line of JSON."""
        self._requests.put(request)

    def answer(self) -> str:
        """The answer, as a line of JSON; empty if there is none yet, so that TVM sees a hang-up."""
        try:
            return msgspec.json.encode(self._answers.get(timeout=POLL_SECONDS)).decode()
        except Empty:
            return ""

    def _work(self) -> None:
        self._builder, self._timer = Worker("build"), Worker("time")
        try:
            self._builder.wait_until_ready()
            self._timer.wait_until_ready()
        except TuningError as error:
            self._answers.put(Failed(str(error)))
            return
        self._answers.put(Ready())
        while True:
            self._answers.put(self._answered(self._requests.get()))

    def _answered(self, line: str) -> msgspec.Struct:
        """A crash is an answer as well: it says something of the candidate, not of the machine."""
        try:
            request = msgspec.json.decode(line, type=Request)
            worker = self._builder if isinstance(request, Build) else self._timer
            return worker.ask(request, msgspec.Struct, NO_LIMIT)
        except (RequestFailed, WorkerDied, msgspec.MsgspecError) as error:
            return Failed(str(error))
        except TuningError:  # no process starts any more, which is not the candidate's fault
            os._exit(1)


def serve(host: str, port: int, tracker: Address, key: str) -> NoReturn:
    """Serve until this process is interrupted or terminated; its processes end with it.

    Args:
        host: to listen on; whoever can connect can run code.
        port: the same, 1 to 65535.
        tracker: where to register, again and again.
        key: as what.

    Raises:
        TuningError: the port is not free.
        KeyboardInterrupt: it was interrupted or terminated.
    """
    # A session is to have what is registered here. It may be forked, since nothing in this process
    # has begun to compute: neither torch's threads nor CUDA, which the workers start afresh.
    multiprocessing.set_start_method("fork", force=True)
    session = cache(Session)
    tvm_ffi.register_global_func(ASK, lambda request: session().ask(str(request)), override=True)
    tvm_ffi.register_global_func(ANSWER, lambda: session().answer(), override=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ended: Future[NoReturn] = Future()
    listen = (host, port, tracker, key, ended)
    threading.Thread(target=_listen, args=listen, daemon=True).start()
    try:
        ended.result()
    finally:
        ended.cancel()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _listen(host: str, port: int, tracker: Address, key: str, ended: Future[NoReturn]) -> None:
    """TVM's server, begun again when a session ends badly: it takes that for its own end.

    It does when a client is killed while a session answers.
    """

    def say(end: threading.ExceptHookArgs) -> None:
        if not ended.done():
            print(f"a session ended: {end.exc_value}; waiting for the next", file=sys.stderr)

    threading.excepthook = say
    home = os.getcwd()
    while not ended.done():
        try:
            server = PopenRPCServerState(host, port, port + 1, tracker_addr=tuple(tracker), key=key)
        except (OSError, ValueError) as error:
            ended.set_exception(
                TuningError(f"cannot listen on {host}:{port} ({error}); expected a free port")
            )
            return
        server.thread.join()
        server.sock.close()
        os.chdir(home)  # from the session's folder
        time.sleep(POLL_SECONDS)
