"""A server of a fleet as if it were a worker here: ``tuning.remote HOST PORT KEY``, run by Python.

Holds one session with a server that TVM's tracker gives it, and forwards lines. All that TVM's
client may do, wait for ever included, it does in this process, which `process.Worker` can kill.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tvm import rpc

from deft_tvm.errors import TuningError
from deft_tvm.tuning.child import answers_alone, end_with_parent, write_line
from deft_tvm.tuning.messages import ANSWER, ASK
from deft_tvm.tuning.tracker import Address, free_servers

GONE_SECONDS = 10.0
"""A server whose session ended badly is not registered for a moment."""


def main(host: str, port: str, key: str) -> None:
    """Answer requests until the input ends, or the session does."""
    end_with_parent()
    answers = answers_alone()
    tracker = Address(host, int(port))
    try:
        _wait_for_server(tracker, key)
        session = rpc.connect_tracker(*tracker).request(key)
        ask, answer = (_function(session, name) for name in (ASK, ANSWER))
        write_line(answers, _wait(answer))
        for line in sys.stdin.buffer:
            ask(line.decode())
            write_line(answers, _wait(answer))
    except TuningError as error:
        sys.exit(str(error))
    except (OSError, RuntimeError) as error:
        last = str(error).strip().splitlines()[-1]
        sys.exit(f"the session with a server of key {key!r} ended: {last}")


def _wait_for_server(tracker: Address, key: str) -> None:
    """TVM's client would wait for ever.

    Raises:
        TuningError: the tracker has had none for a while, or has gone.
    """
    deadline = time.monotonic() + GONE_SECONDS
    while True:
        try:
            free_servers(tracker, key)
            return
        except TuningError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _function(session: rpc.RPCSession, name: str) -> Callable[..., str]:
    try:
        return session.get_function(name)
    except AttributeError:
        raise RuntimeError("it was not started with `deft-tvm serve-device`") from None


def _wait(answer: Callable[[], str]) -> bytes:
    while not (line := answer()):
        pass
    return str(line).encode()


if __name__ == "__main__":
    main(*sys.argv[1:])
