"""Times of calls as a model of many layers sees them: each on KV that no cache holds any more.

A step is copied as often as the copies' KV is several times the L2 cache, and all copies are called
in turn. On a GPU they are one CUDA graph, so that no launch is waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deft_tvm.device import DeviceProfile
from deft_tvm.limit import Limit
from deft_tvm.timing import Events, captured
from deft_tvm.workloads import Case

MOST_COPIES = 24
CACHES = 3
"""So many times the L2 cache the KV of all copies is, as far as `MOST_COPIES` allows."""
FEWEST_REPLAYS, MOST_REPLAYS = 15, 100
SECONDS = 0.25
"""For the replays of one measurement, where it does not take longer."""

Call = Callable[[], object]


def count_of(case: Case, device: DeviceProfile) -> int:
    """How many copies leave nothing of one in the caches when its turn comes again."""
    kv = Limit.of(case.forest, case.spec).num_bytes
    cache = device.l2_bytes if device.kind == "cuda" else 0  # a CPU's clock is for trying this out
    return min(MOST_COPIES, CACHES * cache // max(1, kv) + 1)


def rotated(case: Case, count: int) -> list[Case]:
    """The case and `count` - 1 others that differ in the numbers of q and the cache alone."""
    others = [
        replace(case, q=_other(case.q), buffers=tuple(map(_other, case.buffers)))
        for _ in range(count - 1)
    ]
    return [case, *others]


def _other(tensor: Tensor) -> Tensor:
    """Of the same shape and type; 8 bits, which torch does not draw, stay as they are."""
    return tensor.clone() if tensor.element_size() == 1 else torch.empty_like(tensor).normal_()


def seconds_of(calls: Sequence[Call], kind: str) -> tuple[float, ...]:
    """Seconds of one call, in each of some rounds over all of them.

    Args:
        calls: on a GPU they wait for nothing.
        kind: of the device: by its own clock, or by the host's.

    Raises:
        RuntimeError: they cannot be captured in a CUDA graph.
    """
    rounds = _replayed(calls) if kind == "cuda" else _by_host(calls)
    return tuple(round(seconds / len(calls), 10) for seconds in rounds)


def _replayed(calls: Sequence[Call]) -> list[float]:
    graph = captured(lambda: [call() for call in calls])
    (first,) = _events(graph.replay, 1)
    return _events(graph.replay, _rounds(first))


def launched(calls: Sequence[Call]) -> tuple[float, ...]:
    """As `seconds_of`, of calls that no graph can hold, so that launches may be waited for."""

    def once() -> None:
        for call in calls:
            call()

    once()
    (first,) = _events(once, 1)
    return tuple(seconds / len(calls) for seconds in _events(once, _rounds(first)))


def cold_seconds(call: Call) -> tuple[float, ...]:
    """Of a CUDA graph of one call, with the caches emptied before each replay."""
    graph, events = captured(call), Events()
    events(graph.replay)
    return tuple(events(graph.replay) for _ in range(2 * FEWEST_REPLAYS))


def _rounds(seconds: float) -> int:
    return int(min(MOST_REPLAYS, max(FEWEST_REPLAYS, SECONDS / max(seconds, 1e-9))))


def _events(call: Call, rounds: int) -> list[float]:
    """Seconds of each round by the GPU's clock; the host is rounds ahead."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [1e-3 * float(begin.elapsed_time(end)) for begin, end in events]


def _by_host(calls: Sequence[Call]) -> list[float]:
    found: list[float] = []
    for _ in range(FEWEST_REPLAYS + 1):
        begin = time.perf_counter()
        for call in calls:
            call()
        found.append(time.perf_counter() - begin)
    return found[1:]


def host_seconds(call: Call, rounds: int = 20) -> float:
    """The median of what a call takes of the host's time."""
    found = []
    for _ in range(rounds):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)
