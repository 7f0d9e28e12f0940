"""A plan on the device, and the launches of both stages over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial as bind
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deft_tvm.arrays import Int32
from deft_tvm.peers.triton.plan import Plan
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import Case
from deft_tvm.workloads.tensors import token_places

LOG2_E = 1.4426950408889634
FEWEST_COLUMNS = 16
"""A product over fewer takes as long, and Triton has none."""


class Tiling(NamedTuple):
    """How one kernel walks a tile.

    Attributes:
        lanes: rows of its products.
        tokens: of one step of the online softmax.
        warps: of a program.
        stages: of Triton's pipeline. Addresses of KV are loaded too, which takes every other one.
        registers: the most that a thread may take, where a few less than it would take let a
            second program onto a multiprocessor.
    """

    lanes: int
    tokens: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass
class Step:
    """One step of attention: what a peer's `make` returns.

    Attributes:
        out: [rows, query heads, v_width] in q's type and the caller's order, which calls return.
        plan: that is run.
        tilings: by lanes.
        launches: the kernels, in order.
    """

    out: Tensor
    plan: Plan
    tilings: Mapping[int, Tiling]
    launches: list[Callable[[], object]] = field(repr=False)

    def __call__(self) -> Tensor:
        for launch in self.launches:
            launch()
        return self.out


def step(case: Case, plan: Plan, tilings: Mapping[int, Tiling]) -> Step:
    """Buffers, and launches that use nothing else: they may be captured in a graph.

    Args:
        case: the tensors, on the device that shall run; read in place, from their pages.
        plan: for the case's forest.
        tilings: for each size of tiles that the plan has, in lanes.
    """
    from deft_tvm.peers.triton.kernels import attend

    spec, q = case.spec, case.q.contiguous()
    device = q.device
    heads = (spec.num_q_heads, spec.v_width)
    out = torch.empty(len(q), *heads, dtype=q.dtype, device=device)
    partials = torch.empty(plan.num_partials, *heads, device=device)
    lse = torch.empty(plan.num_partials, spec.num_q_heads, device=device)
    keys, values, rope = (case.buffers[number] for number in spec.operands[:3])
    arrays = (
        _slots(case, plan),
        plan.tokens.sight,
        plan.entry_row,
        plan.entry_source,
        plan.entry_place,
    )
    indices = [on(device, array) for array in arrays]
    known = constants(spec)
    launches: list[Callable[[], object]] = [
        bind(
            attend[(len(tiles) * spec.num_kv_heads,)],
            *(q, keys, values, rope),
            *indices,
            on(device, tiles),
            *(out, partials, lse),
            spec.scale * LOG2_E,
            **known,
            HEADS_FIRST=spec.layout == "HND" and not case.pages.is_contiguous,
            MASKED=plan.masked,
            BLOCK_M=lanes,
            BLOCK_N=tilings[lanes].tokens,
            num_warps=tilings[lanes].warps,
            num_stages=tilings[lanes].stages,
            maxnreg=tilings[lanes].registers,
        )
        for lanes, tiles in plan.tiles.items()
    ]
    if len(plan.merged):
        launches.append(_merge(spec, plan, partials, lse, out))
    return Step(out, plan, tilings, launches)


def _merge(
    spec: AttentionSpec, plan: Plan, partials: Tensor, lse: Tensor, out: Tensor
) -> Callable[[], object]:
    """A program takes as many partials, or heads, as rows have few or many partials."""
    from deft_tvm.peers.triton.kernels import merge

    mean = -(-plan.num_partials // len(plan.merged))
    parts = min(16, block(mean, fewest=2))
    heads, columns = 16 // parts, min(128, block(spec.v_width))
    grid = (len(plan.merged), -(-spec.num_q_heads // heads), -(-spec.v_width // columns))
    return bind(
        merge[grid],
        *(partials, lse, on(out.device, plan.merged), out),
        HEADS=spec.num_q_heads,
        WIDTH=spec.v_width,
        BLOCK_P=parts,
        BLOCK_H=heads,
        BLOCK_D=columns,
        num_warps=4,
    )


def constants(spec: AttentionSpec) -> dict[str, int | bool]:
    """What the first kernel is compiled for."""
    rope = None if spec.rope is None else spec.buffers[spec.rope]
    return {
        "KV_HEADS": spec.num_kv_heads,
        "GROUP": spec.group,
        "PAGE": spec.page_size,
        "TIED": spec.tied,
        "K_BEGIN": spec.k.begin,
        "K_WIDTH": spec.k_width,
        "K_CACHED": spec.buffers[spec.k.buffer].width,
        "K_BLOCK": block(spec.k_width),
        "V_BEGIN": spec.v.begin,
        "V_WIDTH": spec.v_width,
        "V_CACHED": spec.buffers[spec.v.buffer].width,
        "V_BLOCK": block(spec.v_width),
        "ROPE_HEADS": 1 if rope is None else rope.heads,
        "ROPE_WIDTH": spec.rope_width,
        "ROPE_BLOCK": block(spec.rope_width),
    }


def block(width: int, fewest: int = FEWEST_COLUMNS) -> int:
    """The power of two that holds so many."""
    return max(fewest, 1 << (width - 1).bit_length()) if width else fewest


def on(device: torch.device, array: Int32) -> Tensor:
    """A copy there, aligned as whole tensors are."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, copy=True)


def _slots(case: Case, plan: Plan) -> NDArray[np.int32]:
    """int32[T], page · page size + slot of each token in the plan's order."""
    page, slot = (place.numpy() for place in token_places(case.forest, case.pages))
    slots = page * case.pages.page_size + slot
    return slots[plan.tokens.number].astype(np.int32)
