"""Compile kernels for this machine and run a plan's arrays through them, with nothing between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import tvm

from deft_tvm.build import compile_module, lower, tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.layer import kernel_operands
from deft_tvm.plan import Plan, make_plan
from deft_tvm.schedules import KernelTask, schedule, tiles_of
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.workloads import Case


class Compiled:
    """The functions of a module, in the order of its tile classes."""

    def __init__(self, tasks: Sequence[KernelTask], module: tvm.IRModule) -> None:
        self.tiles = tiles_of(tasks)
        self.executable = compile_module(module, tasks[0].target)
        self.functions = [self.executable[task.symbol] for task in tasks]

    def run(
        self, case: Case, plan: Plan, poison: float = float("nan")
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage 1 and 2; outputs and workspaces start out as `poison`."""
        spec, q = case.spec, case.q
        out = torch.full((plan.num_rows, spec.num_q_heads, spec.v_width), poison, dtype=q.dtype)
        lse = torch.full((plan.num_rows, spec.num_q_heads), poison)
        slots = max(1, plan.num_partials)
        partial_out = torch.full((slots, spec.num_q_heads, spec.v_width), poison)
        partial_lse = torch.full((slots, spec.num_q_heads), poison)
        caches = [b[None] if case.pages.is_contiguous else b for b in case.buffers]
        layer = kernel_operands(spec, (*caches, *case.layer[len(caches) :]))
        sinks = [] if case.sinks is None else [case.sinks]
        arrays = (plan.header, plan.page_indices, plan.row_order, plan.row_positions, plan.runs)
        index_arrays = tuple(map(torch.tensor, arrays))
        for tile, begin, end in plan.launches:
            items = torch.tensor(plan.items[begin:end])
            head = (q, *layer, *index_arrays, items, torch.tensor(plan.dests))
            self.functions[tile](*head, out, lse, partial_out, partial_lse)
        if len(plan.merge_rows):
            indptr, rows = torch.tensor(plan.merge_indptr), torch.tensor(plan.merge_rows)
            self.functions[-1](partial_out, partial_lse, *sinks, indptr, rows, out, lse)
        return out, lse


def tasks_with(
    features: Iterable[str], spec: AttentionSpec, tiles: Sequence[TileShape]
) -> tuple[KernelTask, ...]:
    """Kernels scheduled for a machine with these instructions, compiled for this one."""
    return tuple(
        replace(task, features=frozenset(features))
        for task in tasks_for(spec, DeviceProfile.detect(), tiles)
    )


def scheduled(tasks: Sequence[KernelTask], decisions: Sequence[dict[str, int]]) -> tvm.IRModule:
    """One module of all kernels, each by its decision."""
    module = tvm.IRModule()
    for task, decision in zip(tasks, decisions, strict=True):
        module.update(schedule(task, decision)[0].mod)
    return module


def few_and_many(spec: AttentionSpec) -> Compiled:
    """Default kernels of two tile classes, that of the fewest lane rows and one of many."""
    here = DeviceProfile.detect()
    tiles = default_tiles(spec, "llvm", frozenset(here.features))
    many = next((tile for tile in tiles if tile.lane_rows >= 32), tiles[-1])
    tasks = tasks_for(spec, here, tuple(dict.fromkeys((tiles[0], many))))
    return Compiled(tasks, lower(tasks))


def worst(compiled: Compiled, case: Case, grouping: str = "auto") -> float:
    """The largest error as a share of what correct rounding explains; over 1 is a fault.

    With several tile classes of different operands the widest of their bounds counts.
    """
    profile = DeviceProfile.detect()
    plan = make_plan(case.forest, case.pages, case.spec, compiled.tiles, profile, grouping=grouping)
    out, lse = compiled.run(case, plan)
    exact = case.reference()
    bounds = [exact.bound(tile.operand, case.spec.dtype) for tile in compiled.tiles]
    dead = exact.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead), "rows that see nothing have LSE -inf, others not"
    assert not out[dead].any(), "rows that see nothing are zeros"
    error = float((out.double() - exact.out).abs().amax())
    lse_error = float((lse.double() - exact.lse)[~dead].abs().max()) if not dead.all() else 0.0
    return max(_share(error, max(bound.out for bound in bounds)), _share(lse_error, bounds[0].lse))


def _share(error: float, bound: float) -> float:
    return 0.0 if error == 0 else error / bound
