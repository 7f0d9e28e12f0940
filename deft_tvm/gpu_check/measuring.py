"""Measures one cell: by our kernels, by them with another grouping, and by a peer."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import torch

from deft_tvm import workloads
from deft_tvm.bench.core import Cell
from deft_tvm.bench.step import running
from deft_tvm.check import judge
from deft_tvm.device import DeviceProfile, Kind, gpu_error
from deft_tvm.gpu_check.rotation import (
    Call,
    cold_seconds,
    count_of,
    host_seconds,
    launched,
    rotated,
    seconds_of,
)
from deft_tvm.gpu_check.speeds import Beside, Ours, difference, verdict
from deft_tvm.limit import Limit
from deft_tvm.peers import PEERS, Gathered, Peer
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import Case, tensors

LONGEST_CALL = 0.2
"""Seconds of one call beyond which a peer is not timed."""
COPYING_SECONDS = 4.0
"""For a peer's copies, some of which search for their best setting each."""
FREE_PART = 0.6
"""Of the free memory that a peer's copies may take."""


class Measuring:
    """One cell's tensors and our plan, made once for all that is measured of it.

    Args:
        cell: which.
        kind: of the device.

    Raises:
        DeftError: there is no such workload or attention, or no module for it.
    """

    def __init__(self, cell: Cell, kind: Kind) -> None:
        self.cell, self.kind = cell, kind
        self.device = DeviceProfile.detect(kind)
        spec = AttentionSpec.parse(cell.spec)
        self.attention = TreeAttention(spec, device=kind)
        case = tensors(workloads.parse(cell.workload).forest, spec, device=kind)
        self.cases = rotated(case, count_of(case, self.device))
        self.plan = self.attention.plan(case.forest, case.pages)
        self._gathered: dict[int, Gathered] = {}

    @property
    def case(self) -> Case:
        return self.cases[0]

    def ours(self) -> Ours:
        """Runs of one plan, the plan itself, and how exact a run is."""
        case, attention = self.case, self.attention
        run = attention.run(case.q, case.kv, sinks=case.sinks)
        manifest = attention.artifact.manifest
        return Ours(
            cell=self.cell,
            seconds=self._seconds(attention),
            plan=host_seconds(lambda: attention.plan(case.forest, case.pages)),
            copies=len(self.cases),
            limit=Limit.of(case.forest, case.spec),
            exactness=judge(case, self.plan, *run),
            grouping=self.plan.grouping,
            items=self.plan.num_items,
            module=attention.artifact.directory.name,
            tuned=manifest.tuned,
        )

    def grouped(self, grouping: str) -> Beside:
        """Our kernels by a plan of another grouping."""
        other = TreeAttention(self.case.spec, self.attention.artifact, self.kind, grouping=grouping)
        other.plan(self.case.forest, self.case.pages)
        seconds = self._seconds(other)
        return Beside(cell=self.cell, name=grouping, seconds=seconds, copies=len(self.cases))

    def _seconds(self, attention: TreeAttention) -> tuple[float, ...]:
        return seconds_of([running(case, attention) for case in self.cases], self.kind)

    def peer(self, name: str, bound: float) -> Beside:
        """A peer, compared with ours once.

        Its call may have a method ``over_a_copy``: the same call over KV of its own. Otherwise it
        is made anew for each copy of the case; where that takes too much time or memory, caches
        are emptied before each call instead.

        Args:
            name: in `PEERS`.
            bound: how far ours may be from what is right.
        """
        peer, beside = PEERS[name], partial(Beside, cell=self.cell, name=name)
        gathered = self.gathered(0)
        if lacks := peer.lacks(gathered):
            return beside(failed=lacks)
        before = self._memory()
        first = peer.make(gathered)
        found = peer.ordered(gathered, first())
        own, _ = self.attention.run(self.case.q, self.case.kv, sinks=self.case.sinks)
        max_error, rms_error = difference(found, own)
        beside = partial(beside, max_error=max_error, rms_error=rms_error)
        if wrong := verdict(max_error, rms_error, bound):
            return beside(failed=wrong)
        seconds = host_seconds(first, 2)
        if seconds > LONGEST_CALL:
            return beside(failed=f"one call takes {seconds:.2f} s")
        calls = self._copies(first, peer, self._affordable(self._memory() - before))
        times, in_graph = self._timed(calls)
        return beside(seconds=times, copies=len(calls), in_graph=in_graph)

    def _copies(self, first: Call, peer: Peer, count: int) -> list[Call]:
        """The call and others over KV of their own, as many as there is time for."""
        over_a_copy = getattr(first, "over_a_copy", None)
        calls, end = [first], time.monotonic() + COPYING_SECONDS
        while len(calls) < count and time.monotonic() < end:
            other = peer.make(self.gathered(len(calls))) if over_a_copy is None else over_a_copy()
            calls.append(other)
        return calls

    def gathered(self, number: int) -> Gathered:
        """Of one of the cases; all peers share it."""
        if number not in self._gathered:
            self._gathered[number] = Gathered(self.cases[number])
        return self._gathered[number]

    def _timed(self, calls: list[Call]) -> tuple[tuple[float, ...], bool]:
        """Seconds of a call, and whether in a graph; of the first one where some are missing."""
        missing = len(calls) < len(self.cases) and self.kind == "cuda"
        try:
            return cold_seconds(calls[0]) if missing else seconds_of(calls, self.kind), True
        except Exception:
            if self.kind == "cpu" or gpu_error():
                raise
        return launched(calls), False

    def _memory(self) -> int:
        """Bytes of the device that tensors take; not counted on a CPU."""
        return torch.cuda.memory_allocated() if self.kind == "cuda" else 0

    def _affordable(self, size: int) -> int:
        """Copies of a peer whose first one took `size` bytes."""
        if self.kind == "cpu" or size <= 0:
            return len(self.cases)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        return max(1, min(len(self.cases), int(FREE_PART * free / size)))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within once so many seconds are over, as compilations may never end."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
