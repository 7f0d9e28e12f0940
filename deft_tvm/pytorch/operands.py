"""What a plan becomes for the operators: tensors on the device, and the module's key."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deft_tvm.arrays import Int32
from deft_tvm.plan import Plan


class Operands(NamedTuple):
    """Arguments of the operators after q and kv: ``tree_attention(q, kv, *operands)``."""

    page_indices: Tensor | None
    plan: list[Tensor]
    items: list[Tensor]
    module: str


def operands_of(plan: Plan, paged: bool, device: torch.device, module: str) -> Operands:
    """Move a plan to `device`; `paged` is whether the cache has pages, or tokens."""
    spans = {tile: (begin, end) for tile, begin, end in plan.launches}
    items = [slice(*spans.get(tile, (0, 0))) for tile in range(len(plan.tiles))]
    arrays = [plan.header, plan.row_order, plan.runs, plan.dests]
    arrays += [plan.merge_indptr, plan.merge_rows, plan.page_indices]
    tensors = _upload([*arrays, *(plan.items[part] for part in items)], device)
    return Operands(tensors[6] if paged else None, tensors[:6], tensors[7:], module)


def _upload(arrays: list[Int32], device: torch.device) -> list[Tensor]:
    """Copies on `device`, as parts of one tensor: a GPU gets a single transfer."""
    whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    parts = whole.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
