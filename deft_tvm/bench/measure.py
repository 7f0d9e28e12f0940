"""One workload under one attention, beside its peers and its limit, in one measurement.

Ours counts everything: one full plan, one run, the merge. `peers` says what is not counted of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from deft_tvm.bench.step import (
    ALONE,
    BETWEEN,
    OURS,
    OUTPUT,
    PRODUCT,
    Calls,
    between_products,
    outputs,
    parts,
    planning,
    running,
    step,
)
from deft_tvm.errors import InputError
from deft_tvm.limit import Limit, probes
from deft_tvm.peers import PEERS, QUICK, Gathered
from deft_tvm.plan import GROUPINGS, Traffic
from deft_tvm.timing import Summary, Timing
from deft_tvm.timing import measure as measure_calls
from deft_tvm.workloads import Case

if TYPE_CHECKING:
    from deft_tvm.pytorch import TreeAttention

LONGEST_CALL = 2.5
"""Seconds of one call beyond which a peer is not compared: six rounds of it would tell no more."""
HOPELESS = 8.0
"""A grouping so many times slower than the one that was chosen is measured once."""
MOST_ROUNDS = 60
OTHERS = tuple(name for name in GROUPINGS if name != "auto")
"""Groupings that a choice may be compared with: those of the paper, no sharing, packing by cost."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One workload, measured.

    Attributes:
        workload: its name.
        spec: the attention.
        device: slug of the machine.
        module: the folder's name of the artifact that ran.
        grouping: that the plan chose.
        limit: what the step cannot do without.
        timings: by name, ours first under `OURS`, then the peers, then the limit's probes.
        traffic: what the plan moves.
        left_out: peers that were not run, and why.
        cold: whether caches were emptied before each call.
        parts: of ours, in rounds of their own: plan, run, and of a run the partials and the merge.
        groupings: one run by the plan of each, `OURS` being the one that was chosen.
        between: see `step.between_products`; empty where it was not asked for.
    """

    workload: str
    spec: str
    device: str
    module: str
    grouping: str
    limit: Limit
    timings: dict[str, Timing]
    traffic: Traffic
    left_out: dict[str, str]
    cold: bool
    parts: dict[str, Timing]
    groupings: dict[str, Timing] = {}
    between: dict[str, Timing] = {}

    @property
    def peers(self) -> dict[str, Timing]:
        """The peers alone, the fastest first."""
        names = (name for name in self.timings if name in PEERS)
        return {name: self.timings[name] for name in sorted(names, key=self._median)}

    def speedups(self) -> dict[str, Summary]:
        """How many times faster than each peer ours was, the fastest peer first."""
        ours = self.timings[OURS]
        return {name: ours.speedup(timing) for name, timing in self.peers.items()}

    @property
    def share(self) -> Summary:
        """Of our time, what the limit would take."""
        return self.limit.share(self.timings, OURS)

    @property
    def between_ratio(self) -> Summary:
        """Our time between two matrix products over our time alone."""
        return self.between[ALONE].speedup(self.between[BETWEEN])

    @property
    def product_ratio(self) -> Summary:
        """A product's time after ours over its time after another product."""
        return self.between[PRODUCT].speedup(self.between[OUTPUT])

    def _median(self, name: str) -> float:
        return self.timings[name].median


def _nobody(_: str) -> None:
    """Is told, and does not listen."""


def measure(
    name: str,
    case: Case,
    attention: TreeAttention,
    peers: Iterable[str] = QUICK,
    *,
    budget: float = 4.0,
    cold: bool = False,
    groupings: Sequence[str] = (),
    between: bool = False,
    say: Callable[[str], None] = _nobody,
) -> Measurement:
    """Time one step of `attention`, its peers and the limit's probes, in turn.

    Args:
        name: of the workload, for the record.
        case: the tensors to run on.
        attention: ours; it is planned anew in each call.
        peers: names in `PEERS`.
        budget: seconds for the measured rounds; parts, groupings and products take a quarter each.
        cold: before each call empty the caches, as the other layers of a model do.
        groupings: names in `OTHERS` whose runs are timed beside the chosen one's.
        between: time the step between two matrix products, too.
        say: told in a few words of each stage before it begins.

    Raises:
        InputError: there is no such peer.
    """
    cold_bytes = 2 * attention.profile.l3_bytes if cold else 0
    with torch.inference_mode():
        calls, left_out = _prepared(case, peers, say)
        calls = {OURS: step(case, attention), **calls, **probes(case.q.dtype)}
        say(f"timing {', '.join(list(calls)[:-2])} in turn, for {budget:g} s or longer")

        def timed(calls: Calls, budget: float) -> dict[str, Timing]:
            return measure_calls(
                calls, budget=budget, cold_bytes=cold_bytes, most_rounds=MOST_ROUNDS
            )

        timings = timed(calls, budget)
        del calls
        chosen = attention.plan(case.forest, case.pages).grouping
        traffic = attention.traffic
        say("timing the plan, the partials and the merge alone")
        of_ours = timed(parts(case, attention, *outputs(case)), budget / 4)
        others: dict[str, Timing] = {}
        if groupings:
            say(f"timing plans by {', '.join(groupings)}")
            others = _groupings(case, attention, groupings, timed, budget / 4)
        inside: dict[str, Timing] = {}
        if between:
            say("timing a step between two matrix products")
            inside = measure_calls(between_products(case, attention, cold_bytes), budget=budget / 4)
    return Measurement(
        workload=name,
        spec=str(case.spec),
        device=attention.profile.slug,
        module=attention.artifact.directory.name,
        grouping=chosen,
        limit=Limit.of(case.forest, case.spec),
        timings=timings,
        traffic=traffic,
        left_out=left_out,
        cold=cold,
        parts=of_ours,
        groupings=others,
        between=inside,
    )


def _prepared(
    case: Case, peers: Iterable[str], say: Callable[[str], None]
) -> tuple[Calls, dict[str, str]]:
    """The calls of the peers that can run the case in time, and why the others are left out."""
    calls: Calls = {}
    left_out = {}
    gathered: Gathered | None = None
    for name in peers:
        if name not in PEERS:
            raise InputError(f"peer is {name!r}; expected one of {', '.join(PEERS)}")
        if gathered is None:
            say("gathering KV from its pages for the peers")
            gathered = Gathered(case)
        if lacks := PEERS[name].lacks(gathered):
            left_out[name] = lacks
            continue
        say(f"preparing {name}")
        call = PEERS[name].make(gathered)
        call()
        seconds = _seconds(call)
        if seconds > LONGEST_CALL:
            left_out[name] = f"one call takes {seconds:.1f} s"
        else:
            calls[name] = call
    return calls, left_out


def _groupings(
    case: Case,
    attention: TreeAttention,
    names: Sequence[str],
    timed: Callable[[Calls, float], dict[str, Timing]],
    budget: float,
) -> dict[str, Timing]:
    """Runs by the plans of other groupings, beside the current plan's."""
    from deft_tvm.pytorch import TreeAttention

    calls: Calls = {OURS: running(case, attention)}
    hopeless = {}
    calls[OURS]()
    longest = HOPELESS * _seconds(calls[OURS])
    for name in names:
        other = TreeAttention(case.spec, attention.artifact, grouping=name)
        planning(case, other)()
        call = running(case, other)
        seconds = _seconds(call)
        if seconds > longest:
            hopeless[name] = Timing((seconds,))
        else:
            calls[name] = call
    return {**timed(calls, budget), **hopeless}


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
