"""The operators ``torch.ops.deft_tvm.tree_attention`` and ``tree_attention_out``.

``plan`` is header, row_order, runs, dests, merge_indptr, merge_rows and ``items`` one tensor for
each tile class of the module, all as in `deft_tvm.plan.Plan`; ``page_indices`` is None where the
cache has tokens instead of pages. ``module`` is a key, see `deft_tvm.pytorch.loaded`. Whether the
cache has all pages that the plan names is checked by `TreeAttention.run` and not here, since the
answer lies on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.pytorch.checks import check_inputs, check_no_gradient, check_outputs
from deft_tvm.pytorch.loaded import Loaded, resolve, spec_of
from deft_tvm.pytorch.workspace import workspace

_INPUTS = (
    "Tensor q, Tensor[] kv, Tensor? page_indices, Tensor[] plan, Tensor[] items, str module"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# define and impl cost a tenth of custom_op at each call. The library lives as long as this object.
_library = torch.library.Library("deft_tvm", "DEF")
_library.define(f"tree_attention({_INPUTS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(
    f"tree_attention_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()", tags=_TAGS
)


def _tree_attention(
    q: Tensor,
    kv: Sequence[Tensor],
    page_indices: Tensor | None,
    plan: Sequence[Tensor],
    items: Sequence[Tensor],
    module: str,
) -> tuple[Tensor, Tensor]:
    loaded = resolve(module, q.device.type)
    check_inputs(loaded, q, kv, plan[1], page_indices is not None)
    rows, heads = q.shape[0], loaded.spec.num_q_heads
    out = q.new_empty((rows, heads, loaded.spec.v_width))
    lse = q.new_empty((rows, heads), dtype=torch.float32)
    _launch(loaded, q, kv, page_indices, plan, items, out, lse)
    return out, lse


@torch.library.register_fake("deft_tvm::tree_attention", lib=_library)
def _(
    q: Tensor,
    kv: Sequence[Tensor],
    page_indices: Tensor | None,
    plan: Sequence[Tensor],
    items: Sequence[Tensor],
    module: str,
) -> tuple[Tensor, Tensor]:
    check_no_gradient(q, kv)
    rows, heads = q.shape[0], q.shape[1]
    out = q.new_empty((rows, heads, spec_of(module).v_width))
    return out, q.new_empty((rows, heads), dtype=torch.float32)


def _tree_attention_out(
    q: Tensor,
    kv: Sequence[Tensor],
    page_indices: Tensor | None,
    plan: Sequence[Tensor],
    items: Sequence[Tensor],
    module: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    loaded = resolve(module, q.device.type)
    check_inputs(loaded, q, kv, plan[1], page_indices is not None)
    check_outputs(loaded, out, lse, plan[1])
    _launch(loaded, q, kv, page_indices, plan, items, out, lse)


@torch.library.register_fake("deft_tvm::tree_attention_out", lib=_library)
def _(
    q: Tensor,
    kv: Sequence[Tensor],
    page_indices: Tensor | None,
    plan: Sequence[Tensor],
    items: Sequence[Tensor],
    module: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    check_no_gradient(q, kv)


for _device in ("CPU", "CUDA"):
    _library.impl("tree_attention", _tree_attention, _device)
    _library.impl("tree_attention_out", _tree_attention_out, _device)

TREE_ATTENTION = torch.ops.deft_tvm.tree_attention.default
TREE_ATTENTION_OUT = torch.ops.deft_tvm.tree_attention_out.default


def _launch(
    loaded: Loaded,
    q: Tensor,
    kv: Sequence[Tensor],
    page_indices: Tensor | None,
    plan: Sequence[Tensor],
    items: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
) -> None:
    """Stage 1 for each tile class that has items, then stage 2 if a row has partials or none."""
    if len(items) != len(loaded.partials):
        raise InputError(f"items has {len(items)} tensors; expected {len(loaded.partials)}")
    header, row_order, runs, dests, merge_indptr, merge_rows = plan
    if page_indices is None:
        kv, page_indices = _one_page(loaded, kv), _page_zero(q.device)
    k, v, rope = (kv[buffer] for buffer in loaded.regions)
    # Each slot is the entry of one row of one item, so their number need not be read.
    slots = dests.shape[0] if merge_rows.shape[0] else 0
    partials = workspace(q.device, max(1, slots), loaded.spec.num_q_heads, loaded.spec.v_width)
    for kernel, part in zip(loaded.partials, items, strict=True):
        if part.shape[0]:
            head = (q, k, v, rope, header, page_indices, row_order, runs)
            kernel(*head, part, dests, out, lse, *partials)
    if merge_rows.shape[0]:
        loaded.merge(*partials, merge_indptr, merge_rows, out, lse)


def _one_page(loaded: Loaded, kv: Sequence[Tensor]) -> list[Tensor]:
    """Buffers ``[tokens, heads, width]`` as one page each, in the module's layout."""
    nhd = loaded.spec.layout == "NHD"
    return [(buffer if nhd else buffer.transpose(0, 1)).unsqueeze(0) for buffer in kv]


@cache
def _page_zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
