"""The one measuring loop: several calls in turn, so that a slow second hurts all of them alike.

No time without its spread: a `Timing` keeps every sample, and its summary is the median with a
95 % confidence interval from order statistics, which supposes nothing about the distribution (Le
Boudec, *Performance Evaluation of Computer and Communication Systems*, section 2.2.2).

On a GPU the host's clock would add what a launch and a wait take, tens of microseconds: `Events`
asks the device.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch

DIGITS = 8
"""Of a time that is kept: ten nanoseconds, below which no clock tells the truth."""
FEWEST_ROUNDS = 6
"""Fewer samples have no 95 % interval of the median: 2 · 0.5⁶ is 3 %, 2 · 0.5⁵ is 6 %."""
SMALLEST = 0.05
"""A change of a median that is worth a word."""
LEAD_BYTES = 1 << 30
"""A GPU that reads 4 TB/s needs a quarter of a millisecond for them: a host launches meanwhile."""


class Summary(msgspec.Struct, frozen=True):
    """A median and the 95 % confidence interval around it; seconds, or a ratio of seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: tuple[float, ...]) -> Summary:
        """Of one sample or more; with fewer than `FEWEST_ROUNDS` the interval is their range."""
        ordered = sorted(samples)
        n = len(ordered)
        below = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)) - 1)
        return cls(statistics.median(ordered), ordered[below], ordered[n - 1 - below])


class Timing(msgspec.Struct, frozen=True):
    """What `measure` found of one call.

    Attributes:
        seconds: of every round, in order.
    """

    seconds: tuple[float, ...]

    @property
    def summary(self) -> Summary:
        return Summary.of(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speedup(self, reference: Timing) -> Summary:
        """How many times faster than `reference`, round by round of the same measurement."""
        pairs = zip(reference.seconds, self.seconds, strict=True)
        return Summary.of(tuple(other / own for other, own in pairs))


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float = 2.0,
    warmup: int = 2,
    most_rounds: int = 1000,
    cold_bytes: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time `calls` in turn, A B A B, until the budget is spent.

    Args:
        calls: what to time, by name; arguments are bound beforehand.
        budget: seconds for all rounds together, warm-up not counted. At least `FEWEST_ROUNDS`
            rounds are made, whatever they take.
        warmup: rounds that are not counted.
        most_rounds: rounds after which to stop in any case.
        cold_bytes: before each call walk a buffer of so many bytes on all of torch's threads. Twice
            the last-level cache leaves none of the call's data in it; 0 leaves caches as they are.
        clock: seconds, from any origin.
        stopwatch: seconds of one call by another clock, such as `Events`; `cold_bytes` are then
            its business.
    """
    cool = _nothing if stopwatch else walk(cold_bytes)

    def once(call: Callable[[], object]) -> float:
        cool()
        begin = clock()
        call()
        return clock() - begin

    timed = stopwatch or once
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for _ in range(warmup):
            for call in calls.values():
                call()
        rounds, started = 0, clock()
        while rounds < min(FEWEST_ROUNDS, most_rounds) or (
            rounds < most_rounds and clock() - started < budget
        ):
            for name, call in calls.items():
                seconds[name].append(round(timed(call), DIGITS))
            rounds += 1
    return {name: Timing(tuple(samples)) for name, samples in seconds.items()}


class Events:
    """Seconds of a call on a GPU by the GPU's own clock, with nothing of it in the L2 cache.

    Before each call the device reads far more than its cache holds. While it does, the host
    launches the call, so that what is measured is the device's work and not the host's.
    """

    def __init__(self, size: int = LEAD_BYTES) -> None:
        import torch

        self._buffer = torch.ones(size // 4, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], object]) -> float:
        begin, end = self._events
        self._buffer.sum()  # only read: what is written would have to leave the cache meanwhile
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


def captured(call: Callable[[], object], warmup: int = 2) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what a call launches.

    Args:
        call: launches on the current stream and waits for nothing. The tensors that it makes live
            as long as the graph, the others have to.
        warmup: calls beforehand, in which modules are loaded and compiled.

    Raises:
        RuntimeError: it cannot be captured.
    """
    import torch

    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    finally:
        torch.cuda.set_stream(current)  # torch stays on the other one after a failure
    return graph


def walk(size: int) -> Callable[[], Any]:
    """Reads `size` bytes, so that caches hold them and nothing else.

    As a model's weights are between two attention layers. What is written as well has to leave the
    cache while the next call reads: calls that wait for memory took 7 to 17 % longer (AMD EPYC Zen
    4, 2026-11-28).
    """
    if size <= 0:
        return _nothing
    import torch

    return torch.ones(-(-size // 4), dtype=torch.float32).sum


def _nothing() -> None:
    pass


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
