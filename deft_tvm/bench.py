"""Tree attention beside what torch and TVM have for it, on one workload and in one measurement.

Ours counts everything: one full plan, one run, the merge. `peers` says what is not counted of the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec
import torch

from deft_tvm.errors import InputError
from deft_tvm.peers import PEERS, QUICK, Gathered
from deft_tvm.plan import Traffic
from deft_tvm.timing import Summary, Timing
from deft_tvm.timing import measure as measure_calls
from deft_tvm.workloads import Case

if TYPE_CHECKING:
    from deft_tvm.pytorch import TreeAttention

OURS = "deft_tvm"


class Measurement(msgspec.Struct, frozen=True):
    """One workload, measured.

    Attributes:
        workload: its name.
        spec: the attention.
        device: slug of the machine.
        module: the artifact that ran.
        timings: by name, ours first under `OURS`.
        plan: of the plan alone, a part of ours.
        traffic: what the plan moves.
        left_out: peers that were not run, and why.
    """

    workload: str
    spec: str
    device: str
    module: str
    timings: dict[str, Timing]
    plan: Timing
    traffic: Traffic
    left_out: dict[str, str]

    def speedups(self) -> dict[str, Summary]:
        """How many times faster than each peer ours was."""
        ours = self.timings[OURS]
        return {name: ours.speedup(t) for name, t in self.timings.items() if name != OURS}


def _nobody(_: str) -> None:
    """Is told, and does not listen."""


def measure(
    name: str,
    case: Case,
    attention: TreeAttention,
    peers: Iterable[str] = QUICK,
    *,
    budget: float = 4.0,
    cold_bytes: int = 0,
    say: Callable[[str], None] = _nobody,
) -> Measurement:
    """Time one step of `attention` and of its peers, in turn.

    Args:
        name: of the workload, for the record.
        case: the tensors to run on.
        attention: ours; it is planned anew in each call.
        peers: names in `PEERS`.
        budget: seconds for the measured rounds.
        cold_bytes: as in `timing.measure`.
        say: told in a few words of each stage before it begins.

    Raises:
        InputError: there is no such peer.
    """
    say("gathering KV from its pages for the peers")
    gathered = Gathered(case)
    chosen, left_out = _fitting(gathered, peers)
    calls: dict[str, Callable[[], object]] = {OURS: step(case, attention)}
    with torch.inference_mode():
        for peer in chosen:
            say(f"preparing {peer}")
            calls[peer] = PEERS[peer].make(gathered)
        say(f"timing {', '.join(calls)} in turn, for {budget:g} s or longer")
        timings = measure_calls(calls, budget=budget, cold_bytes=cold_bytes)
        say("timing the plan alone")
        plan = measure_calls({"plan": planning(case, attention)}, budget=budget / 8)["plan"]
    return Measurement(
        workload=name,
        spec=str(case.spec),
        device=attention.profile.slug,
        module=str(attention.artifact.directory),
        timings=timings,
        plan=plan,
        traffic=attention.traffic,
        left_out=left_out,
    )


class Between(msgspec.Struct, frozen=True):
    """One step of attention between two matrix products, and each of the three by itself."""

    alone: dict[str, Timing]
    between: dict[str, Timing]

    def slowdown(self, name: str) -> float:
        """Median between the others over median alone."""
        return self.between[name].median / self.alone[name].median


def between_matmuls(case: Case, attention: TreeAttention, *, budget: float = 2.0) -> Between:
    """Time a step where it stands in a model: after one projection and before another.

    Both multiply ``[rows, heads · width]`` with a square matrix.
    """
    width = case.spec.num_q_heads * case.spec.v_width
    x, w = torch.randn(case.q.shape[0], width), torch.randn(width, width)
    x, w = x.to(case.q.dtype), w.to(case.q.dtype)
    calls = {"projection": lambda: x @ w, OURS: step(case, attention), "output": lambda: x @ w}
    with torch.inference_mode():
        alone = {
            name: measure_calls({name: call}, budget=budget / 6)[name]
            for name, call in calls.items()
        }
        return Between(alone, measure_calls(calls, budget=budget / 2))


def step(case: Case, attention: TreeAttention) -> Callable[[], object]:
    """One full plan and one run, into tensors that are allocated beforehand."""
    spec, plan = case.spec, planning(case, attention)
    out = case.q.new_empty(case.forest.num_rows, spec.num_q_heads, spec.v_width)
    lse = torch.empty(out.shape[:2], device=out.device)

    def call() -> None:
        plan()
        attention.run(case.q, case.kv, out, lse, sinks=case.sinks)

    return call


def planning(case: Case, attention: TreeAttention) -> Callable[[], object]:
    """One full plan."""
    return lambda: attention.plan(case.forest, case.pages)


def _fitting(gathered: Gathered, peers: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    chosen, left_out = [], {}
    for peer in peers:
        if peer not in PEERS:
            raise InputError(f"peer is {peer!r}; expected one of {', '.join(PEERS)}")
        if why := PEERS[peer].lacks(gathered):
            left_out[peer] = why
        else:
            chosen.append(peer)
    return chosen, left_out
