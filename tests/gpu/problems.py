"""Small attention problems with their plans, and what the oracle says of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from emulate import Arguments, translate
from torch import Tensor

from deft_tvm.device import DeviceProfile
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, make_plan
from deft_tvm.reference import Exact, tree_attention
from deft_tvm.schedules import KernelTask, schedule
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest

ARCH = "sm_90a"
TARGET = {"kind": "cuda", "arch": ARCH}
CUDA = DeviceProfile.nominal()


@dataclass(frozen=True)
class Problem:
    """A forest, its random cache and queries, the plan, and room for the results."""

    spec: AttentionSpec
    plan: Plan
    q: Tensor
    caches: tuple[Tensor, ...]
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
    """Random q and caches for `forest` in pages of random order; slots without a token are NaN."""
    random = torch.Generator().manual_seed(0)
    counts = -(-forest.lengths // spec.page_size)
    indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
    order = torch.randperm(int(indptr[-1]), generator=random).numpy().astype(np.int32)
    pages = PageTable(order, indptr, page_size=spec.page_size)
    plan = make_plan(forest, pages, spec, tiles, CUDA, grouping, chunk)
    dtype = getattr(torch, spec.dtype)
    caches = tuple(
        _cache(spec, buffer.heads, buffer.width, forest, pages, random) for buffer in spec.buffers
    )
    q = torch.randn(forest.num_rows, spec.num_q_heads, spec.q_width, generator=random).to(dtype)
    exact = tree_attention(
        q,
        caches,
        forest.parents,
        forest.lengths,
        forest.rows,
        order,
        indptr,
        page_size=spec.page_size,
        layout=spec.layout,
        num_kv_heads=spec.num_kv_heads,
        k=(spec.k.buffer, spec.k.begin, spec.k.end),
        v=(spec.v.buffer, spec.v.begin, spec.v.end),
        rope=spec.rope,
        scale=spec.scale,
        soft_cap=spec.soft_cap,
        window=spec.window,
    )
    rows, heads, slots = forest.num_rows, spec.num_q_heads, max(1, plan.num_partials)
    return Problem(
        spec=spec,
        plan=plan,
        q=q,
        caches=caches,
        exact=exact,
        out=torch.full((rows, heads, spec.v_width), torch.nan, dtype=dtype),
        lse=torch.full((rows, heads), torch.nan),
        partial_out=torch.full((slots, heads, spec.v_width), torch.nan),
        partial_lse=torch.full((slots, heads), torch.nan),
    )


def cuda_of(task: KernelTask, decision: dict[str, int] | None = {}) -> str:  # noqa: B006
    """CUDA source of the task's scheduled kernel; `decision` None samples the space."""
    return cuda_source(compile_cuda(schedule(task, decision)[0].mod, ARCH))


def partial_task(spec: AttentionSpec, tile: TileShape) -> KernelTask:
    return KernelTask("partial", spec, tile, TARGET, frozenset(), "partial")


def merge_task(spec: AttentionSpec) -> KernelTask:
    return KernelTask("merge", spec, None, TARGET, frozenset(), "merge")


def partial_arguments(problem: Problem, begin: int, end: int) -> Arguments:
    """The arguments of a partial kernel for the items [begin, end), by name."""
    plan, spec = problem.plan, problem.spec
    by_role = {
        "q": problem.q,
        "k_cache": problem.caches[spec.k.buffer],
        "v_cache": problem.caches[spec.v.buffer],
        "rope_cache": problem.caches[spec.k.buffer if spec.rope is None else spec.rope],
    }
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
    return {
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


def run(problem: Problem, folder: Path, decision: dict[str, int] | None = {}) -> None:  # noqa: B006
    """Both stages of `problem` in emulation, block after block."""
    spec, plan = problem.spec, problem.plan
    for tile, begin, end in plan.launches:
        kernel = translate(cuda_of(partial_task(spec, plan.tiles[tile]), decision), "partial")
        blocks = (end - begin) * spec.num_kv_heads
        kernel.run(folder, blocks, partial_arguments(problem, begin, end))
    if len(plan.merge_rows):
        kernel = translate(cuda_of(merge_task(spec), decision), "merge")
        kernel.run(folder, len(plan.merge_rows) * spec.num_q_heads, merge_arguments(problem))


def check(problem: Problem) -> None:
    """The results are within the rounding that the oracle allows the tile classes used."""
    operands = {problem.plan.tiles[tile].operand for tile, _, _ in problem.plan.launches}
    operand = next((o for o in operands if o != "float32"), "float32")
    bound = problem.exact.bound(operand, problem.spec.dtype)
    assert (problem.out.double() - problem.exact.out).abs().max() <= bound.out
    seen = problem.exact.lse > -torch.inf
    assert torch.equal(problem.lse > -torch.inf, seen)
    assert (problem.lse.double() - problem.exact.lse)[seen].abs().max() <= bound.lse


def _cache(
    spec: AttentionSpec,
    heads: int,
    width: int,
    forest: Forest,
    pages: PageTable,
    random: torch.Generator,
) -> Tensor:
    """A cache in the spec's layout whose used slots are random and whose others are NaN."""
    shape = (pages.max_page + 1, spec.page_size, heads, width)
    cache = torch.full(shape, torch.nan)
    for node, length in enumerate(forest.lengths.tolist()):
        x = torch.arange(length)
        begin = int(pages.page_indptr[node])
        page = torch.from_numpy(pages.page_indices.copy()).long()[begin + x // spec.page_size]
        values = torch.randn(length, heads, width, generator=random)
        cache[page, x % spec.page_size] = values
    ordered = cache if spec.layout == "NHD" else cache.transpose(1, 2)
    return ordered.contiguous().to(getattr(torch, spec.dtype))


def _strides(buffers: dict[str, Tensor]) -> dict[str, int]:
    """Strides, pages and page sizes under the names that the kernel gives them."""
    named = {}
    for name, letter in (("q", "q"), ("k_cache", "k"), ("v_cache", "v"), ("rope_cache", "r")):
        strides = buffers[name].stride()
        named |= {f"{letter}_s{axis}": stride for axis, stride in enumerate(strides)}
        named |= {f"{letter}_pages": len(buffers[name]), f"{letter}_page": 0}
    return named
