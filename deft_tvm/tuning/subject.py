"""What is tuned: one kernel on the real work items of a workload. Needs no compiler.

A subject is a few strings and numbers, so that another process can make the same tensors from it:
the workload's forest, a cache in shuffled pages, and the plan's arrays. Index arrays are therefore
always those of a real plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import msgspec
import numpy as np
import torch
from torch import Tensor

from deft_tvm import workloads
from deft_tvm.device import DeviceProfile
from deft_tvm.layer import kernel_operands
from deft_tvm.limit import Limit
from deft_tvm.plan import Plan, make_plan
from deft_tvm.plan.columns import Item, Run
from deft_tvm.plan.cost import token_bytes
from deft_tvm.plan.traffic import visible_flops
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.timing import LEAD_BYTES

MERGE = "merge"
MOST_COLD_BYTES = 256 << 20

Arguments = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Inputs and outputs of a kernel."""


class Subject(msgspec.Struct, frozen=True):
    """One kernel and the work that it is timed on.

    Attributes:
        kernel: ``TileShape.name``, or ``merge``.
        spec: the attention, as ``str(spec)``.
        workload: as `workloads.parse` reads it.
        tiles: the module's tile classes, among which the plan chooses.
        device: whose rates the plan is made by.
    """

    kernel: str
    spec: str
    workload: str
    tiles: tuple[TileShape, ...]
    device: DeviceProfile

    @property
    def tile(self) -> TileShape | None:
        """The tile class of a partial kernel."""
        return next((tile for tile in self.tiles if tile.name == self.kernel), None)

    def launch(self) -> Launch:
        """The kernel's arguments; made once per process."""
        return _launch(msgspec.json.encode(self))


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's arguments on real work.

    Attributes:
        subject: of which kernel and workload.
        case: forest, pages, q and cache.
        plan: the arrays of the whole workload.
        items: the kernel's own work items; none for ``merge``.
        inputs: tensors that the kernel reads, in the order of its parameters.
        outputs: tensors that it writes, in the order of its parameters, after the inputs.
    """

    subject: Subject
    case: workloads.Case
    plan: Plan
    items: np.ndarray
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (*self.inputs, *self.outputs)

    def tokens(self, item: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Page and slot of each token of an item, and bool[rows, tokens]: who sees it."""
        plan, (row_begin, num_rows, run_begin, run_end, num_tokens, *_) = self.plan, item
        runs = plan.runs[run_begin:run_end].astype(np.int64)
        token = np.arange(num_tokens)
        run = runs[np.searchsorted(runs[:, Run.OFFSET], token, side="right") - 1].T
        offset, page_begin, first_slot, seen_begin, seen_end, diagonal, position = run
        x = first_slot + token - offset
        page = plan.page_indices[page_begin + x // plan.page_size]
        rows = np.arange(row_begin, row_begin + num_rows)[:, None]
        first_row = seen_begin + np.maximum(0, token - offset - diagonal)
        seen = (first_row <= rows) & (rows < seen_end)
        if plan.window is not None:
            seen &= plan.row_positions[rows] - (position + token - offset) < plan.window
        return (
            torch.from_numpy(page).long(),
            torch.from_numpy(x % plan.page_size),
            torch.from_numpy(seen),
        )

    @cached_property
    def limit(self) -> Limit:
        """What the kernel reads, each item its own tokens, and must multiply."""
        spec = self.case.spec
        if self.subject.tile is None:
            return Limit(num_bytes=sum(tensor.nbytes for tensor in self.inputs), flops=0)
        pairs = sum(int(self.tokens(item)[2].sum()) for item in self.items.tolist())
        tokens = int(self.items[:, Item.NUM_TOKENS].sum(dtype=np.int64))
        return Limit(num_bytes=tokens * token_bytes(spec), flops=visible_flops(spec, pairs))


def cold_bytes(device: DeviceProfile) -> int:
    """To be walked before each timed call, so that caches hold nothing of the call before."""
    return min(2 * device.l3_bytes, MOST_COLD_BYTES) if device.kind == "cpu" else LEAD_BYTES


def subjects(
    spec: AttentionSpec, workload: str, tiles: Sequence[TileShape], device: DeviceProfile
) -> list[Subject]:
    """The kernels that a plan of `workload` launches.

    Raises:
        WorkloadError: there is no such workload.
    """
    name = workloads.parse(workload).name
    plan = _plan(_case(str(spec), name, device.kind), tiles, device)
    kernels = [tiles[tile].name for tile, _, _ in plan.launches]
    kernels += [MERGE] if len(plan.merge_rows) else []
    return [Subject(kernel, str(spec), name, tuple(tiles), device) for kernel in kernels]


def forget_launches() -> None:
    """The next launch gets new tensors, which lie elsewhere in memory."""
    _launch.cache_clear()
    _case.cache_clear()


@lru_cache(maxsize=16)
def _launch(encoded: bytes) -> Launch:
    subject = msgspec.json.decode(encoded, type=Subject)
    case = _case(subject.spec, subject.workload, subject.device.kind)
    plan = _plan(case, subject.tiles, subject.device)
    if subject.tile is None:
        items, (inputs, outputs) = plan.items[:0], _merge_arguments(case, plan)
    else:
        number = subject.tiles.index(subject.tile)
        begin, end = next(span for tile, *span in plan.launches if tile == number)
        items = plan.items[begin:end]
        inputs, outputs = _partial_arguments(case, plan, items)
    return Launch(subject, case, plan, items, _on(subject, inputs), _on(subject, outputs))


@lru_cache(maxsize=2)
def _case(spec: str, workload: str, kind: str) -> workloads.Case:
    forest = workloads.parse(workload).forest
    return workloads.tensors(forest, AttentionSpec.parse(spec), device=kind)


def _plan(case: workloads.Case, tiles: Sequence[TileShape], device: DeviceProfile) -> Plan:
    return make_plan(case.forest, case.pages, case.spec, tiles, device)


def _partial_arguments(case: workloads.Case, plan: Plan, items: np.ndarray) -> Arguments:
    layer = kernel_operands(case.spec, case.layer)
    rows = (plan.row_order, plan.row_positions)
    arrays = (plan.header, plan.page_indices, *rows, plan.runs, items, plan.dests)
    inputs = (case.q, *layer, *map(torch.tensor, arrays))
    return inputs, (*_results(case), *_partials(case, plan))


def _merge_arguments(case: workloads.Case, plan: Plan) -> Arguments:
    random = torch.Generator().manual_seed(0)
    partials = (partial.normal_(generator=random) for partial in _partials(case, plan))
    sinks = () if case.sinks is None else (case.sinks,)
    entries = map(torch.tensor, (plan.merge_indptr, plan.merge_rows))
    return (*partials, *sinks, *entries), _results(case)


def _results(case: workloads.Case) -> tuple[Tensor, Tensor]:
    out = torch.zeros(*case.q.shape[:2], case.spec.v_width, dtype=case.q.dtype)
    return out, torch.zeros(case.q.shape[:2])


def _partials(case: workloads.Case, plan: Plan) -> tuple[Tensor, Tensor]:
    shape = (plan.num_partials, case.spec.num_q_heads)
    return torch.zeros(*shape, case.spec.v_width), torch.zeros(shape)


def _on(subject: Subject, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors on the subject's device."""
    return tuple(tensor.to(subject.device.kind) for tensor in tensors)
