"""TVM's tracker, which knows the servers of a fleet: its address, and what it is asked here.

TVM's own client tries a tracker that is not there for a minute, and waits for a server of a key
that nobody has for ever; these questions are answered within seconds, or refused.
"""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
from shlex import quote
from typing import Any, NamedTuple

from tvm.rpc import base

from deft_tvm.errors import TuningError, installing

ANSWER_SECONDS = 5.0


class Address(NamedTuple):
    """Where a tracker listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """From ``HOST:PORT``.

        Raises:
            TuningError: it is something else.
        """
        host, _, port = text.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise TuningError(f"tracker is {text!r}; expected HOST:PORT, as in 127.0.0.1:9190")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def check_tracker(tracker: Address) -> None:
    """Refuse one that does not answer.

    Raises:
        TuningError: none does.
    """
    _summary(tracker)


def free_servers(tracker: Address, key: str) -> int:
    """How many servers of `key` wait for a session; where all are busy, how many there are.

    Raises:
        TuningError: no tracker answers, or it has no server of that key.
    """
    summary = _summary(tracker)
    keys = [info["key"].removeprefix("server:") for info in summary["server_info"]]
    if key not in keys:
        known = f"one of ({', '.join(sorted(set(keys)))})" if keys else "one that has registered"
        raise TuningError(
            f"no server of key {key!r} at {tracker}; expected {known}: start one there with "
            f"`{serve_command(tracker, key)}`"
        )
    queue = summary["queue_info"].get(key, {"free": 0})
    return int(queue["free"]) or keys.count(key)


def serve_command(tracker: Address, key: str) -> str:
    """What to type on a device machine."""
    return f"deft-tvm serve-device --tracker {tracker} --key {quote(key)}"


def tune_command(tracker: Address, key: str) -> str:
    """What to type on the tuning machine."""
    return f"deft-tvm tune --rpc {tracker} --key {quote(key)}"


def tracker_command(tracker: Address) -> str:
    """What to type where the tracker shall run.

    TVM's tracker takes the first free port before its ``--port-end``, by default 9199, whatever
    its ``--port`` is.
    """
    ports = f"--port {tracker.port} --port-end {tracker.port + 1}"
    return f"python -m tvm.exec.rpc_tracker --host {tracker.host} {ports}"


def _summary(tracker: Address) -> dict[str, Any]:
    try:
        with socket.create_connection(tracker, ANSWER_SECONDS) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            magic = struct.unpack("<i", base.recvall(connection, 4))[0]
            if magic != base.RPC_TRACKER_MAGIC:
                raise OSError("what listens there is no tracker")
            base.sendjson(connection, [base.TrackerCode.SUMMARY])
            _, summary = base.recvjson(connection)
            return dict(summary)
    except (OSError, json.JSONDecodeError) as error:
        needs = "" if importlib.util.find_spec("tornado") else f" (after {installing('rpc')})"
        raise TuningError(
            f"no tracker answers at {tracker}: {error}; start one with "
            f"`{tracker_command(tracker)}`{needs}"
        ) from None
