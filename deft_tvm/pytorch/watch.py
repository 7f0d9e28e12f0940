"""A run under observation: against the oracle (``DEFT_TVM_CHECK``), and timed (``DEFT_TVM_DEBUG``).

Both are asked for by environment variables. They are read where an attention is made: to read what
is not set takes a fifth of the time of a plan between two layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deft_tvm import env
from deft_tvm.debug import tell
from deft_tvm.errors import ExactnessError
from deft_tvm.plan import Plan, traffic
from deft_tvm.spec import AttentionSpec


class Asked(NamedTuple):
    """What the environment asks for."""

    check: bool
    timed: bool
    told: bool

    @classmethod
    def now(cls) -> Asked | None:
        """None if nothing is asked for."""
        timed = env.DEBUG.get() >= 2
        asked = cls(env.CHECK.get(), timed, timed or env.DUMP.get() is not None)
        return asked if any(asked) else None

    def watch(self, spec: AttentionSpec, plan: Plan) -> Watch | None:
        """What to do beside each run of a plan, if anything. Prints what was planned."""
        if self.told:
            tell(2, "plan", lambda: f"{plan}\n{traffic(plan, spec)}")
        return Watch(spec, plan, self) if self.check or self.timed else None


class Watch(NamedTuple):
    """What to do beside each run of a plan."""

    spec: AttentionSpec
    plan: Plan
    asked: Asked

    def run(
        self, run: Callable[[], tuple[Tensor, Tensor]], q: Tensor, kv: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `run` returns for q and kv.

        Raises:
            ExactnessError: it is further from the oracle than rounding explains.
        """
        _synchronise(q.device)
        begin = time.perf_counter()
        out, lse = run()
        _synchronise(q.device)
        if self.asked.timed:
            self._report(time.perf_counter() - begin)
        if self.asked.check:
            self._compare(q, kv, out, lse)
        return out, lse

    def _report(self, seconds: float) -> None:
        moved = traffic(self.plan, self.spec).tree.total
        rate = moved / seconds / 1e9
        line = (
            f"{self.plan.num_items} items, {moved} bytes, {seconds * 1e6:.1f} µs, {rate:.2f} GB/s"
        )
        tell(2, "run", lambda: line)

    def _compare(self, q: Tensor, kv: Sequence[Tensor], out: Tensor, lse: Tensor) -> None:
        from deft_tvm.check import bound_of, largest_error
        from deft_tvm.workloads import Case

        exact = Case.of_layer(self.spec, self.plan.forest, self.plan.pages, q, kv).reference()
        bound = bound_of(self.plan, exact, self.spec.dtype)
        _hold("out", largest_error(out, exact.out), bound.out)
        _hold("lse", largest_error(lse, exact.lse), bound.lse)


def _hold(name: str, error: float, bound: float) -> None:
    if error > bound:
        raise ExactnessError(
            f"{name} is {error:.3g} from the oracle's; expected at most {bound:.3g}, which "
            f"rounding explains ({env.CHECK.name} is set)"
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
