"""The operators ``torch.ops.deft_tvm.tree_attention`` and ``tree_attention_out``.

They take in ``kv`` all of a layer's tensors: the cache buffers, the scales of those in 8 bits, the
sinks; ``plan`` and ``layout`` as `deft_tvm.pytorch.plan_tensors` makes them, and ``module``, a key
as `deft_tvm.pytorch.loaded` describes it. So an exported program holds tensors and a string, and
finds its module in whatever process it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from deft_tvm.errors import InputError
from deft_tvm.layer import kernel_operands
from deft_tvm.pytorch.checks import check_dense, check_devices, check_inputs, check_outputs
from deft_tvm.pytorch.gradients import check_no_gradient
from deft_tvm.pytorch.loaded import BOTH, CHECKED, Loaded, resolve, spec_of
from deft_tvm.pytorch.plan_tensors import PlanTensors
from deft_tvm.pytorch.workspace import workspace

_INPUTS = "Tensor q, Tensor[] kv, Tensor plan, Tensor layout, str module"
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# A call by define and impl costs a tenth of one by custom_op. What is defined lives as long as this
# object.
_library = torch.library.Library("deft_tvm", "DEF")
_library.define(f"tree_attention({_INPUTS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(f"tree_attention_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()", tags=_TAGS)


class Operands(NamedTuple):
    """Arguments of the operators after q and kv: ``tree_attention(q, kv, *operands)``."""

    plan: Tensor
    layout: Tensor
    module: str


def _tree_attention(
    q: Tensor, kv: Sequence[Tensor], plan: Tensor, layout: Tensor, module: str
) -> tuple[Tensor, Tensor]:
    loaded = resolve(module, q.device.type)
    return attend(loaded, PlanTensors.of_tensors(plan, layout, loaded.num_tiles), q, kv)


@torch.library.register_fake("deft_tvm::tree_attention", lib=_library)
def _(
    q: Tensor, kv: Sequence[Tensor], plan: Tensor, layout: Tensor, module: str
) -> tuple[Tensor, Tensor]:
    check_devices(plan.device, q, *kv)
    check_no_gradient(q, kv)
    return outputs(q, spec_of(module).v_width)


def _tree_attention_out(
    q: Tensor,
    kv: Sequence[Tensor],
    plan: Tensor,
    layout: Tensor,
    module: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    loaded = resolve(module, q.device.type)
    attend(loaded, PlanTensors.of_tensors(plan, layout, loaded.num_tiles), q, kv, out, lse)


@torch.library.register_fake("deft_tvm::tree_attention_out", lib=_library)
def _(
    q: Tensor,
    kv: Sequence[Tensor],
    plan: Tensor,
    layout: Tensor,
    module: str,
    out: Tensor,
    lse: Tensor,
) -> None:
    check_devices(plan.device, q, *kv, out, lse)
    check_no_gradient(q, kv, out=out, lse=lse)


for _device in ("CPU", "CUDA"):
    _library.impl("tree_attention", _tree_attention, _device)
    _library.impl("tree_attention_out", _tree_attention_out, _device)

TREE_ATTENTION = torch.ops.deft_tvm.tree_attention.default
TREE_ATTENTION_OUT = torch.ops.deft_tvm.tree_attention_out.default


def outputs(
    q: Tensor, v_width: int, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`out` and `lse`, new tensors where they are not given."""
    if out is None:
        out = q.new_empty((*q.shape[:2], v_width))
    if lse is None:
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return out, lse


def attend(
    loaded: Loaded,
    step: PlanTensors,
    q: Tensor,
    kv: Sequence[Tensor],
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What both operators do on tensors with data; outputs that are not given are new.

    Raises:
        InputError: a tensor does not fit the module's spec or the plan.
    """
    try:
        return _attend(loaded, step, q, kv, out, lse)
    except (RuntimeError, InputError):
        # What has no strides is told before the strides that it says it has.
        check_dense(q, kv, out=out, lse=lse)
        raise


def _attend(
    loaded: Loaded,
    step: PlanTensors,
    q: Tensor,
    kv: Sequence[Tensor],
    out: Tensor | None,
    lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_no_gradient(q, kv, out=out, lse=lse)
    # Otherwise the run checks them, in a tenth of the time.
    here = loaded.scaled or not step.paged or len(kv) != loaded.tensors or q.dim() != 3
    if here:
        check_inputs(loaded, step, q, kv)
    given = [tensor for tensor in (out, lse) if tensor is not None]
    out, lse = outputs(q, loaded.spec.v_width, out, lse)
    if here and given:
        check_outputs(loaded, step, out, lse)
    stages = BOTH if here else BOTH | CHECKED
    if not loaded.run(stages, *arguments(loaded, step, q, kv, out, lse)):
        check_inputs(loaded, step, q, kv)
        check_outputs(loaded, step, out, lse)
        raise InputError("a tensor does not fit the plan; expected those that run describes")
    if given and not torch.is_inference_mode_enabled():
        # As every operator does that writes to a tensor, so that autograd misses what was there.
        increment_version(given)
    return out, lse


def arguments(
    loaded: Loaded, step: PlanTensors, q: Tensor, kv: Sequence[Tensor], out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """What `Loaded.run` takes after the stages."""
    if not step.paged:
        kv = [*_one_page(loaded, kv[: loaded.caches]), *kv[loaded.caches :]]
    partials = workspace(q, max(1, step.partials), *loaded.partial_shape)
    operands = kernel_operands(loaded.spec, kv)
    return (step.plan, step.layout, *partials, out, lse, q, *operands)


def _one_page(loaded: Loaded, kv: Sequence[Tensor]) -> list[Tensor]:
    """Buffers ``[tokens, heads, width]`` as one page each, in the module's layout."""
    nhd = loaded.spec.layout == "NHD"
    return [(buffer if nhd else buffer.transpose(0, 1)).unsqueeze(0) for buffer in kv]
