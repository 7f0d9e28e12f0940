"""Work that is killed with SIGKILL at a random moment, again and again; a script too.

    python tests/kills.py 50        # so many kills of real tunings, and what was left after each

A process says what it has acknowledged through a pipe; nothing of that may be missing afterwards.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import tuning_run
from forked import processes

from deft_tvm.device import DeviceProfile
from deft_tvm.tuning import search, strategy
from deft_tvm.tuning.log import TuningLog
from deft_tvm.tuning.result import Progress

LONGEST = 300.0
"""Seconds until the first message, beyond which a round counts as hung."""


@dataclass(frozen=True)
class Killed:
    """What is known of a process after its end.

    Attributes:
        messages: all that it acknowledged, in order.
        at_work: it did not end by itself.
    """

    messages: list[int]
    at_work: bool


def kill_while(
    work: Callable[..., None], *arguments: object, after: int = 1, delay: float = 0.0
) -> Killed:
    """Run ``work(say, *arguments)`` and kill it `delay` seconds after `after` messages."""
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_worker, args=(work, theirs, *arguments))
    process.start()
    theirs.close()
    messages: list[int] = []
    deadline = time.monotonic() + LONGEST
    while len(messages) < after and process.is_alive():
        assert time.monotonic() < deadline, "it hangs"
        if ours.poll(0.01):
            messages += _next(ours)
    time.sleep(delay)
    at_work = process.is_alive()
    process.kill()
    process.join()
    while ours.poll() and (more := _next(ours)):
        messages += more
    return Killed(messages, at_work)


def _worker(work: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    work(pipe.send, *arguments)


def _next(pipe: Connection) -> list[int]:
    try:
        return [pipe.recv()]
    except EOFError:
        return []


def tune(say: Callable[[int], None], root: str, real: bool) -> None:
    """Tune all there is, at random; says how many trials the log has after each."""
    strategy.POOL = 2
    search.new_cost_model = lambda: None

    def listen(event: Progress) -> None:
        if event.phase == "search":
            say(event.trial)

    tuning_run.run(root, None, real=real, listener=listen)


def tuning_rounds(root: Path, rounds: int, real: bool, seed: int = 0) -> Counter[str]:
    """Kill tunings of one log; after each, all that was acknowledged is there, once.

    Returns:
        Rounds killed at work, rounds that ended by themselves, trials kept, damaged lines.
    """
    log = TuningLog(root / DeviceProfile.detect().slug / tuning_run.SPEC.slug)
    rng, found = random.Random(seed), Counter[str]()
    for _ in range(rounds):
        before = log.path.read_bytes() if log.exists() else b""
        delay = rng.uniform(0, 3.0 if real else 0.4)
        killed = kill_while(tune, str(root), real, after=rng.randint(1, 2), delay=delay)
        found["killed" if killed.at_work else "ended"] += 1
        after = log.path.read_bytes()
        assert after.startswith(before), "what was there stays"
        reading = log.read()
        made = Counter(str(t.decision | {"": t.kernel}) for t in reading if not t.final)
        assert len(made) >= max(killed.messages, default=0), "what was acknowledged is there"
        assert set(made.values()) <= {1}, "nothing is repeated"
    reading = log.read()
    found["trials"] = sum(not trial.final for trial in reading)
    found["damaged lines"] = reading.skipped
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(dict(tuning_rounds(Path(scratch), int(sys.argv[1]), real=True, seed=1)))
