"""Small attention problems with their plans, and what the oracle says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from emulate import Arguments, Kernel, translate
from torch import Tensor

from deft_tvm.device import DeviceProfile
from deft_tvm.layer import kernel_operands
from deft_tvm.plan import Plan, make_plan
from deft_tvm.reference import Exact
from deft_tvm.schedules import Decision, KernelTask, MergeTask, PartialTask, schedule
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, tensors

ARCH = "sm_90a"
TARGET = {"kind": "cuda", "arch": ARCH}
CUDA = DeviceProfile.nominal()

# A shared root, a branch with causal rows under it and one with a child; 97 tokens.
BRANCHES = Forest.from_parents([-1, 0, 0, 1], [70, 13, 5, 9], [0, 3, 1, 2])
# More tokens than a kernel locates at a time, twice.
LONG = Forest.from_parents([-1, 0], [601, 21], [2, 3])
# A draft tree under a context: one token and one row a node.
DRAFT = Forest.from_parents([-1, 0, 0, 1, 1, 2, 3], [21, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1])
# Rows of the last 36 of 40 tokens: whole tiles that early rows do not see.
CAUSAL = Forest.from_parents([-1], [40], [36])
# A row that sees nothing, and one that only its parent's tokens.
EMPTY = Forest.from_parents([-1, -1, 1], [0, 3, 0], [1, 0, 2])


@dataclass(frozen=True)
class Problem:
    """A forest with its random tensors, the plan, what is right, and room for the results."""

    case: Case
    plan: Plan
    exact: Exact
    out: Tensor
    lse: Tensor
    partial_out: Tensor
    partial_lse: Tensor


def make_problem(
    spec: AttentionSpec,
    forest: Forest,
    tiles: tuple[TileShape, ...],
    grouping: str = "node",
    chunk: int | None = None,
) -> Problem:
    """Random tensors for `forest` in pages of random order; slots without a token are NaN."""
    case = tensors(forest, spec)
    plan = make_plan(forest, case.pages, spec, tiles, CUDA, grouping, chunk)
    rows, heads, slots = forest.num_rows, spec.num_q_heads, max(1, plan.num_partials)
    return Problem(
        case=case,
        plan=plan,
        exact=case.reference(),
        out=torch.full((rows, heads, spec.v_width), torch.nan, dtype=case.q.dtype),
        lse=torch.full((rows, heads), torch.nan),
        partial_out=torch.full((slots, heads, spec.v_width), torch.nan),
        partial_lse=torch.full((slots, heads), torch.nan),
    )


def cuda_of(task: KernelTask, decision: Decision = {}) -> str:  # noqa: B006
    """CUDA source of the task's kernel, scheduled by default but for what `decision` names."""
    return cuda_source(compile_cuda(schedule(task, decision)[0].mod, ARCH))


def kernel_of(task: KernelTask, source: Callable[[KernelTask], str] = cuda_of) -> Kernel:
    return translate(source(task), task.symbol)


def partial_task(spec: AttentionSpec, tile: TileShape) -> PartialTask:
    return PartialTask(spec, TARGET, frozenset(), tile)


def merge_task(spec: AttentionSpec) -> MergeTask:
    return MergeTask(spec, TARGET, frozenset())


def partial_arguments(problem: Problem, begin: int, end: int) -> Arguments:
    """The arguments of a partial kernel for the items [begin, end), by name."""
    plan, case = problem.plan, problem.case
    names = ["q", "k_cache", "v_cache", "rope_cache"]
    names += ["k_scales", "v_scales"] if case.spec.scaled else []
    names += ["sinks"] if case.spec.sinks else []
    by_role = dict(zip(names, (case.q, *kernel_operands(case.spec, case.layer)), strict=True))
    arrays = {
        name: torch.from_numpy(getattr(plan, name).copy())
        for name in ("header", "page_indices", "row_order", "row_positions", "runs", "dests")
    }
    items = torch.from_numpy(plan.items[begin:end].copy())
    sizes = {
        "num_rows": plan.num_rows,
        "num_positions": len(plan.row_positions),
        "num_runs": len(plan.runs),
        "num_items": end - begin,
        "num_indices": len(plan.page_indices),
        "num_dests": len(plan.dests),
        "num_slots": len(problem.partial_out),
        "q_rows": plan.num_rows,
    }
    return {**by_role, **arrays, "items": items, **sizes, **_strides(by_role), **results(problem)}


def merge_arguments(problem: Problem) -> Arguments:
    plan = problem.plan
    sinks = {} if problem.case.sinks is None else {"sinks": problem.case.sinks}
    return {
        **sinks,
        "merge_indptr": torch.from_numpy(plan.merge_indptr.copy()),
        "merge_rows": torch.from_numpy(plan.merge_rows.copy()),
        "num_slots": len(problem.partial_out),
        "num_merged": len(plan.merge_rows),
        "num_indptr": len(plan.merge_indptr),
        "num_rows": plan.num_rows,
        **results(problem),
    }


def results(problem: Problem) -> dict[str, Tensor]:
    return {n: getattr(problem, n) for n in ("out", "lse", "partial_out", "partial_lse")}


def run(problem: Problem, folder: Path, source: Callable[[KernelTask], str] = cuda_of) -> None:
    """Both stages of `problem` in emulation, block after block, from CUDA by `source`."""
    spec, plan = problem.case.spec, problem.plan
    for tile, begin, end in plan.launches:
        kernel = kernel_of(partial_task(spec, plan.tiles[tile]), source)
        blocks = (end - begin) * spec.num_kv_heads
        run_either_way(kernel, folder, blocks, partial_arguments(problem, begin, end), problem)
    if len(plan.merge_rows):
        kernel = kernel_of(merge_task(spec), source)
        blocks = len(plan.merge_rows) * spec.num_q_heads
        run_either_way(kernel, folder, blocks, merge_arguments(problem), problem)


def run_either_way(
    kernel: Kernel, folder: Path, blocks: int, arguments: Arguments, problem: Problem
) -> None:
    """Run `kernel` with its threads in one order and in the other: not a bit may depend on it."""
    before = {name: result.clone() for name, result in results(problem).items()}
    kernel.run(folder, blocks, arguments, last_first=True)
    found = {name: result.clone() for name, result in results(problem).items()}
    for name, result in results(problem).items():
        result.copy_(before[name])
    kernel.run(folder, blocks, arguments)
    for name, result in results(problem).items():
        torch.testing.assert_close(result, found[name], rtol=0, atol=0, equal_nan=True)


def check(problem: Problem) -> None:
    """The results are within the rounding that the oracle allows the tile classes used."""
    operands = {problem.plan.tiles[tile].operand for tile, _, _ in problem.plan.launches}
    operand = next((o for o in operands if o != "float32"), "float32")
    bound = problem.exact.bound(operand, problem.case.spec.dtype)
    assert (problem.out.double() - problem.exact.out).abs().max() <= bound.out
    seen = problem.exact.lse > -torch.inf
    assert torch.equal(problem.lse > -torch.inf, seen)
    assert (problem.lse.double() - problem.exact.lse)[seen].abs().max() <= bound.lse


def _strides(buffers: dict[str, Tensor]) -> dict[str, int]:
    """Strides, pages and page sizes under the names that the kernel gives them."""
    named = {}
    letters = {
        "q": "q", "k_cache": "k", "v_cache": "v", "rope_cache": "r", "k_scales": "ks",
        "v_scales": "vs",
    }  # fmt: skip
    for name, letter in letters.items():
        if name not in buffers:
            continue
        strides = buffers[name].stride()
        named |= {f"{letter}_s{axis}": stride for axis, stride in enumerate(strides)}
        named |= {f"{letter}_pages": len(buffers[name]), f"{letter}_page": 0}
    return named
