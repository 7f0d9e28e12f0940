"""What one launch must write, in float64 and one work item at a time, to judge candidates by.

Partials are not attention over a tree, so the oracle of whole rows cannot tell them; like it, this
follows the definition and knows no tiles:

    logit_ij = scale · Q_i · K_j        lse_i = ln Σ_j exp(logit_ij)
    out_i    = Σ_j exp(logit_ij - lse_i) V_j       over the tokens j of the item that row i sees
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deft_tvm.plan import Plan
from deft_tvm.reference import Bound, Exact, merge_states
from deft_tvm.tuning.subject import Launch
from deft_tvm.workloads import Case


@dataclass(frozen=True)
class Expected:
    """The kernel's outputs in order, float64, NaN where it must not write; and their bounds."""

    outputs: tuple[Tensor, ...]
    bound: Bound

    def error(self, outputs: Sequence[Tensor]) -> tuple[float, bool]:
        """The largest absolute difference, NaN where a NaN should not be, and whether it is right.

        Args:
            outputs: as the kernel left them; all NaN before it ran.
        """
        worst, right = 0.0, True
        for index, (expected, found) in enumerate(zip(self.outputs, outputs, strict=True)):
            bound = self.bound.lse if index % 2 else self.bound.out
            written = ~expected.isnan()
            found = found.cpu().double()
            differs = written & (found != expected)
            error = float((found - expected)[differs].abs().nan_to_num(torch.inf).max()) if differs.any() else 0.0
            worst = max(worst, error)
            right &= error <= bound and bool(found[~written].isnan().all())
        return worst, right


def expected(launch: Launch) -> Expected:
    """What the launch's kernel writes, and how far off rounding may be."""
    tile, spec = launch.subject.tile, launch.case.spec
    outputs = tuple(torch.full(t.shape, torch.nan, dtype=torch.float64) for t in launch.outputs)
    if tile is None:
        exact = _merge(launch, *outputs)
        return Expected(outputs, exact.bound("float32", spec.dtype))
    exact = _partials(launch, outputs)
    return Expected(outputs, exact.bound(tile.operand, spec.dtype))
