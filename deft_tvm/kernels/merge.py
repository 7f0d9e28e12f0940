"""Stage 2: the tree-topology-aware global reduction of a row's partials by their LSE.

    out = Σ_p exp(lse_p - m) out_p / Σ_p exp(lse_p - m)      lse = m + log Σ_p exp(lse_p - m)

with m the largest lse_p (DeFT, ICLR 2025, section 3.3). A row's partials lie side by side and are
read in the plan's order, so the sum is the same on every run. No partial, or only partials that saw
no key: zeros and -inf. Before the first partial comes the row's sink if there are any: an lse
without an output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from functools import partial as bind
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from deft_tvm.kernels import script
from deft_tvm.kernels.numerics import LOG2_E, exp2_polynomial, finite, natural_lse
from deft_tvm.kernels.work import OF_PLAN, used_parameters, work_loop
from deft_tvm.spec import AttentionSpec

CUDA_SHARES = 8
"""Into so many equal shares a GPU's warps may divide the partials of a row; a CPU has one."""


@cache
def merge_partials(spec: AttentionSpec, kind: str = "llvm", name: str = "merge") -> tirx.PrimFunc:
    """The merge kernel for the output width and dtype of `spec`.

    Returns:
        A function of partial_out ``[W, Hq, v_width]`` and partial_lse ``[W, Hq]``, float32; sinks
        ``[Hq]``, float32, only where the spec has any;
        merge_indptr ``[R' + 1]`` and merge_rows ``[R']``, int32: partial slots
        ``merge_indptr[k] : merge_indptr[k + 1]`` belong to row ``merge_rows[k]``; out
        ``[R, Hq, v_width]`` in q's dtype and lse ``[R, Hq]`` float32, of which only those rows are
        written.
    """
    HQ, VW, SINKS = spec.num_q_heads, spec.v_width, spec.sinks
    ON_CPU = kind == "llvm"
    SHARES = 1 if ON_CPU else CUDA_SHARES
    exp2 = bind(exp2_polynomial, operand="float32") if ON_CPU else tirx.exp2
    weighed = bind(_weighed, exp2=exp2)
    work = work_loop(kind)

    @script.prim_func(s_tir=True)
    def kernel(
        partial_out_handle: T.handle,
        partial_lse_handle: T.handle,
        sinks_handle: T.handle,
        merge_indptr_handle: T.handle,
        merge_rows_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        num_slots, num_merged, num_indptr, num_rows = T.int32(), T.int32(), T.int32(), T.int32()
        partial_out = T.match_buffer(partial_out_handle, (num_slots, HQ, VW), "float32")
        partial_lse = T.match_buffer(partial_lse_handle, (num_slots, HQ), "float32")
        if SINKS:
            sinks = T.match_buffer(sinks_handle, (HQ,), "float32")
        merge_indptr = T.match_buffer(merge_indptr_handle, (num_indptr,), "int32")
        merge_rows = T.match_buffer(merge_rows_handle, (num_merged,), "int32")
        out = T.match_buffer(out_handle, (num_rows, HQ, VW), spec.dtype)
        lse = T.match_buffer(lse_handle, (num_rows, HQ), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for entry in work(num_merged * HQ):
                with T.sblock("row"):
                    T.reads()
                    T.writes()
                    head: T.let[T.int32] = entry % HQ
                    row: T.let[T.int32] = merge_rows[entry // HQ]
                    begin: T.let[T.int32] = merge_indptr[entry // HQ]
                    count: T.let[T.int32] = merge_indptr[entry // HQ + 1] - begin
                    first: T.let[T.float32] = sinks[head] if SINKS else T.float32("-inf")
                    m = T.sblock_alloc_buffer((1,), "float32")
                    total = T.sblock_alloc_buffer((1,), "float32")
                    A = T.sblock_alloc_buffer((VW,), "float32")
                    for _ in T.serial(1):
                        with T.sblock("reduction"):
                            T.reads()
                            T.writes()
                            for p in range(count + 1):
                                with T.sblock("largest"):
                                    vp = T.axis.reduce(count + 1, p)
                                    with T.init():
                                        # TVM's identity of max, for a reduction over threads.
                                        m[0] = T.min_value("float32")
                                    m[0] = T.max(m[0], _lse_of(first, partial_lse, begin, vp, head))
                            for p in range(count + 1):
                                with T.sblock("sum"):
                                    vp = T.axis.reduce(count + 1, p)
                                    with T.init():
                                        total[0] = T.float32(0)
                                    total[0] = total[0] + exp2(
                                        (
                                            _lse_of(first, partial_lse, begin, vp, head)
                                            - finite(m[0])
                                        )
                                        * LOG2_E
                                    )
                            for d, n, w in T.grid(VW, (count + SHARES) // SHARES, SHARES):
                                with T.sblock("weigh"):
                                    vd, vn, vw = T.axis.remap("SRR", [d, n, w])
                                    with T.init():
                                        A[vd] = T.float32(0)
                                    A[vd] = A[vd] + weighed(
                                        partial_out, partial_lse, begin, count, vn * SHARES + vw,
                                        head, vd, m[0],
                                    )  # fmt: skip
                    for _ in T.serial(1):
                        with T.sblock("epilogue"):
                            T.reads()
                            T.writes()
                            for d in range(VW):
                                with T.sblock("write_out"):
                                    vd = T.axis.spatial(VW, d)
                                    out[row, head, vd] = T.Cast(
                                        spec.dtype, A[vd] / T.max(total[0], T.float32(1e-37))
                                    )
                            with T.sblock("write_lse"):
                                lse[row, head] = natural_lse(m[0] * LOG2_E, total[0])

    return used_parameters(kernel).with_attr("global_symbol", name).with_attr(OF_PLAN, True)


def _weighed(
    partial_out: Any,
    partial_lse: Any,
    begin: Any,
    count: Any,
    p: Any,
    head: Any,
    d: Any,
    largest: Any,
    exp2: Callable[[Any], Expr],
) -> Expr:
    """Output d of partial p - 1 by its weight; 0 for p = 0, a sink's, and beyond the last."""
    slot = begin + p - 1
    weight = exp2((partial_lse[slot, head] - finite(largest)) * LOG2_E)
    is_one = tirx.And(p > 0, p <= count)
    return tirx.if_then_else(is_one, partial_out[slot, head, d] * weight, tirx.const(0, "float32"))


def _lse_of(first: Any, partial_lse: Any, begin: Any, p: Any, head: Any) -> Expr:
    """LSE of partial p - 1; `first` for p = 0, the step that a row with no partial has too."""
    return tirx.if_then_else(p == 0, first, partial_lse[begin + p - 1, head])
