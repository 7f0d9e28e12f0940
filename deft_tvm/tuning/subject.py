"""What is tuned: one kernel on the real work items of a workload. Needs no compiler.

A subject is a few strings and numbers, so that another process can make the same tensors from it:
the workload's forest, a cache in shuffled pages, and the plan's arrays. Index arrays are therefore
always those of a real plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np
import torch
from torch import Tensor

from deft_tvm import workloads
from deft_tvm.device import DeviceProfile
from deft_tvm.plan import Plan, make_plan
from deft_tvm.spec import AttentionSpec, TileShape

MERGE = "merge"


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


def subjects(
    spec: AttentionSpec, workload: str, tiles: Sequence[TileShape], device: DeviceProfile
) -> list[Subject]:
    """The kernels that a plan of `workload` launches.

    Raises:
        WorkloadError: there is no such workload.
    """
    name = workloads.parse(workload).name
    plan = _plan(_case(str(spec), name), tiles, device)
    kernels = [tiles[tile].name for tile, _, _ in plan.launches]
    kernels += [MERGE] if len(plan.merge_rows) else []
    return [Subject(kernel, str(spec), name, tuple(tiles), device) for kernel in kernels]


@lru_cache(maxsize=16)
def _launch(encoded: bytes) -> Launch:
    subject = msgspec.json.decode(encoded, type=Subject)
    case = _case(subject.spec, subject.workload)
    plan = _plan(case, subject.tiles, subject.device)
    place = _Place("cuda" if subject.device.kind == "cuda" else "cpu")
    if subject.tile is None:
        return Launch(subject, case, plan, plan.items[:0], *_merge_arguments(case, plan, place))
    number = subject.tiles.index(subject.tile)
    begin, end = next(span for tile, *span in plan.launches if tile == number)
    items = plan.items[begin:end]
    return Launch(subject, case, plan, items, *_partial_arguments(case, plan, items, place))


@lru_cache(maxsize=2)
def _case(spec: str, workload: str) -> workloads.Case:
    return workloads.tensors(workloads.parse(workload).forest, AttentionSpec.parse(spec))


def _plan(case: workloads.Case, tiles: Sequence[TileShape], device: DeviceProfile) -> Plan:
    return make_plan(case.forest, case.pages, case.spec, tiles, device)


Arguments = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Place:
    """The torch device that holds the arguments."""

    device: str

    def __call__(self, values: Tensor | np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(values) if isinstance(values, np.ndarray) else values).to(
            self.device
        )

    def partials(self, case: workloads.Case, plan: Plan) -> tuple[Tensor, Tensor]:
        shape = (plan.num_partials, case.spec.num_q_heads)
        return self(torch.zeros(*shape, case.spec.v_width)), self(torch.zeros(shape))

    def results(self, case: workloads.Case, plan: Plan) -> tuple[Tensor, Tensor]:
        shape = (plan.num_rows, case.spec.num_q_heads)
        out = torch.zeros(*shape, case.spec.v_width, dtype=case.q.dtype)
        return self(out), self(torch.zeros(shape))


def _partial_arguments(
    case: workloads.Case, plan: Plan, items: np.ndarray, place: _Place
) -> Arguments:
    spec, buffers = case.spec, [place(buffer) for buffer in case.buffers]
    k, v = buffers[spec.k.buffer], buffers[spec.v.buffer]
    rope = k if spec.rope is None else buffers[spec.rope]
    arrays = (plan.header, plan.page_indices, plan.row_order, plan.runs, items, plan.dests)
    inputs = (place(case.q), k, v, rope, *map(place, arrays))
    return inputs, (*place.results(case, plan), *place.partials(case, plan))


def _merge_arguments(case: workloads.Case, plan: Plan, place: _Place) -> Arguments:
    random = torch.Generator().manual_seed(0)
    partials = (torch.randn(p.shape, generator=random) for p in place.partials(case, plan))
    arrays = (plan.merge_indptr, plan.merge_rows)
    return (*map(place, partials), *map(place, arrays)), place.results(case, plan)
