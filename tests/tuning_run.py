"""A tuning of a tiny attention, to be run as a script and killed: ``ROOT TRIALS [real]``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from unittest.mock import patch

from tvm import IRModule
from tvm.s_tir.meta_schedule.utils import shash2hex

from deft_tvm.device import DeviceProfile
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning import search, strategy
from deft_tvm.tuning.messages import Outcome
from deft_tvm.tuning.result import TuningResult, ignore
from deft_tvm.tuning.subject import Subject
from deft_tvm.tuning.tune import tune

SPEC = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=32, page_size=4)
strategy.POOL, strategy.MOST_TAUGHT = (
    6,
    16,
)  # what is ranked is the business of other tests, and takes most of the time
WORKLOAD = "few_shot:prompt=1500,branches=16,tokens=80"


class FakeRunner:
    """Takes no time to speak of; the latency of a module is a number made from its hash.

    Attributes:
        timed: how often each module was timed.
    """

    name, width = "fake", 1

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.timed: list[str] = []
        self.broken = broken

    def time(
        self,
        modules: Sequence[IRModule],
        subject: Subject,
        seconds: float,
        rounds: int | None = None,
    ) -> list[Outcome]:
        return self.told([self._one(shash2hex(module)) for module in modules], rounds is not None)

    def told(self, outcomes: list[Outcome], last: bool) -> list[Outcome]:
        """What it answers in the search or, `last`, in a pass of the last measurement."""
        return outcomes

    def renew(self) -> None:
        """Is no process."""

    def close(self) -> None:
        """Holds nothing."""

    def _one(self, key: str) -> Outcome:
        self.timed.append(key)
        time.sleep(0.01)
        if key in self.broken:
            return Outcome("runtime", error="broken")
        latency = 100.0 + int(key, 16) % 1000
        return Outcome("ok", (latency,) * 10, compile_s=0.01, max_error=0.0)


def run(root: str, trials: int | None, real: bool = False, **options) -> TuningResult:
    """Tune `SPEC` on its workload."""
    given = {"device": DeviceProfile.detect(), "listener": ignore, "apart": 0.0} | options
    if not real:
        given.setdefault("runner", FakeRunner())
    # Numbers made from hashes teach no model anything, which takes most of the time.
    new_cost_model = search.new_cost_model if real else lambda: None
    with patch.object(search, "new_cost_model", new_cost_model):
        (found,) = tune([SPEC], [WORKLOAD], trials=trials, root=root, **given)
    return found


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), real=len(sys.argv) > 3)
