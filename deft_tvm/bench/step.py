"""One step of ours as calls to time: whole, alone in its parts, and between two matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deft_tvm.limit import product_dtype
from deft_tvm.timing import walk
from deft_tvm.workloads import Case

if TYPE_CHECKING:
    from deft_tvm.pytorch import TreeAttention

OURS = "deft_tvm"
PLAN, RUN, PARTIAL, MERGE = "plan", "run", "partial", "merge"
BEFORE, ALONE, PROJECTION, PRODUCT, BETWEEN, OUTPUT = (
    "before",
    "alone",
    "projection",
    "product",
    "between",
    "output",
)

Calls = dict[str, Callable[[], object]]


def step(case: Case, attention: TreeAttention) -> Callable[[], object]:
    """One full plan and one run, into tensors that are allocated beforehand."""
    plan, run = planning(case, attention), running(case, attention)

    def call() -> None:
        plan()
        run()

    return call


def planning(case: Case, attention: TreeAttention) -> Callable[[], object]:
    """One full plan."""
    return lambda: attention.plan(case.forest, case.pages)


def running(case: Case, attention: TreeAttention) -> Callable[[], object]:
    """One run by the current plan."""
    out, lse = outputs(case)
    return lambda: attention.run(case.q, case.kv, out, lse, sinks=case.sinks)


def parts(case: Case, attention: TreeAttention, out: Tensor, lse: Tensor) -> Calls:
    """A plan, a run, and of the run the kernels of stage 1 and that of stage 2.

    What a run takes beyond them is the call: checks, arguments, the start of threads. The kernels
    write to `out` and `lse`.
    """
    from deft_tvm.pytorch.loaded import FIRST_STAGE, SECOND_STAGE, resolve
    from deft_tvm.pytorch.ops import arguments
    from deft_tvm.pytorch.plan_tensors import PlanTensors

    plan, layout, module = attention.operands
    loaded = resolve(module, case.q.device.type)
    tensors = PlanTensors.of_tensors(plan, layout, loaded.num_tiles)
    given = arguments(loaded, tensors, case.q, case.layer, out, lse)
    return {
        RUN: running(case, attention),
        PARTIAL: lambda: loaded.run(FIRST_STAGE, *given),
        MERGE: lambda: loaded.run(SECOND_STAGE, *given),
        PLAN: planning(case, attention),
    }


def between_products(case: Case, attention: TreeAttention, cold_bytes: int) -> Calls:
    """A step alone, and where it stands in a model: between a product and an output projection.

    Both multiply ``[rows, heads · width]`` with a square matrix, whose weights leave little of the
    step's data in the caches. Alone it comes after itself, or after a walk over `cold_bytes`. In
    turn, `PROJECTION` and `OUTPUT` are products after a step, `PRODUCT` one after a product.
    """
    width = case.spec.num_q_heads * case.spec.v_width
    dtype = product_dtype(case.q.dtype)
    x, w = torch.randn(case.q.shape[0], width).to(dtype), torch.randn(width, width).to(dtype)
    ours, product = step(case, attention), lambda: x @ w
    before = walk(cold_bytes) if cold_bytes else ours
    return {
        BEFORE: before,
        ALONE: ours,
        PROJECTION: product,
        PRODUCT: product,
        BETWEEN: ours,
        OUTPUT: product,
    }


def outputs(case: Case) -> tuple[Tensor, Tensor]:
    """New tensors for one run."""
    from deft_tvm.pytorch.ops import outputs as new_outputs

    return new_outputs(case.q, case.spec.v_width)
