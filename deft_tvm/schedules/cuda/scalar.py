"""Partial kernels on plain FMAs: rows over warps, columns over lanes.

Element (i, c) of every two-dimensional tile of scores, probabilities and output belongs to warp
``i % warps`` and lane ``c % 32``, so that scores and accumulators never leave registers and a row's
maximum and sum are reductions within one warp.
"""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from deft_tvm.schedules.cuda.copies import load_tile
from deft_tvm.schedules.cuda.threads import LANES, bind_threads, load_together, one_each, share
from deft_tvm.schedules.rule import KernelTask, Knobs
from deft_tvm.schedules.verbs import unroll_all

ROW_VECTORS = ("init_max", "init_sum", "new_max", "rescale", "new_sum", "keep_max", "keep_sum", "normalise")
MATRICES = ("init_out", "logits", "masked_logits", "exponentials", "probabilities", "fold", "keep_out", "write_out")

def scalar(task: KernelTask, sch: Schedule, knobs: Knobs) -> bool:
    if task.kernel != "partial":
        return False
    W = 4
    spec, tile = task.spec, task.tile
    roped = ["_rope"] if spec.rope is not None else []
    loads = ["load_q", "load_v"] + ([] if spec.tied else ["load_k"]) + (["load_q_rope", "load_rope"] if roped else [])
    share(sch, [*loads, "probabilities"])
    loc = sch.get_sblock("locate")
    for k in range(4):
        sch.set_scope(loc, k, "shared")
    for n in ("init_max", "init_sum", "new_max", "rescale", "new_sum", "row_max", "row_sum", "normalise"):
        b = sch.get_sblock(n)
        sch.set_scope(b, 0, "local.rows"); sch.transform_layout(b,("write",0),lambda i: (i%W,i//W), assume_injective_transform=True)
    sch.set_scope(sch.get_sblock("find_cut"), 0, "local")
    b=sch.get_sblock("seek"); sch.set_scope(b,0,"local.fragment"); sch.transform_layout(b,("write",0),lambda j:(j//32%W,j%32,j//(32*W)),assume_injective_transform=True)
    products = ["scores"] + ["scores" + x for x in roped]
    for name in [*products, "logits", "exponentials", "accumulate", "fold", "init_out"]:
        b = sch.get_sblock(name)
        sch.set_scope(b, 0, "local.fragment")
        sch.transform_layout(b, ("write", 0), lambda i, c: (i % W, i // W, c % 32, c // 32), assume_injective_transform=True)
    for l in loads:
        if "load_q" in l:
            load_together(sch, l, W, 1)
    widths = {"load_k": (spec.k.buffer, spec.k_width), "load_v": (spec.v.buffer, spec.v_width), "load_rope": (spec.rope, spec.rope_width)}
    for l in loads:
        if l in widths:
            b, w = widths[l]
            load_tile(sch, l, spec.buffers[b].dtype, tile.operand, w, W)
    i = sch.get_loops(sch.get_sblock("write_lse"))[-1]
    u = sch.add_unit_loop(i)
    _, tx = sch.split(u, [None, 32])
    r, ty = sch.split(i, [None, W]); bind_threads(sch, ty, tx); unroll_all(sch, (r,))
    for b in ("locate",):
        one_each(sch, sch.get_sblock(b), W)
    b = sch.get_sblock("seek")
    j, s = sch.get_loops(b)[-2:]
    _, ty, tx = sch.split(j, [None, W, 32]); bind_threads(sch, ty, tx)
    sch.decompose_reduction(b, s)
    b = sch.get_sblock("find_cut")
    j = sch.get_loops(b)[-1]
    q, tx = sch.split(j, [None, 32])
    sch.bind(tx, "threadIdx.x")
    for b in ROW_VECTORS:
        i = sch.get_loops(sch.get_sblock(b))[-1]
        r, ty = sch.split(i, [None, W]); sch.bind(ty, "threadIdx.y"); unroll_all(sch, (r,))
    for name in MATRICES:
        i, c = sch.get_loops(sch.get_sblock(name))[-2:]
        r, ty = sch.split(i, [None, W]); q, tx = sch.split(c, [None, 32])
        sch.reorder(ty, tx, r, q); bind_threads(sch, ty, tx); unroll_all(sch, (r, q))
    for name in [*products, "accumulate"]:
        b = sch.get_sblock(name)
        i, c, k = sch.get_loops(b)[-3:]
        r, ty = sch.split(i, [None, W]); q, tx = sch.split(c, [None, 32])
        sch.reorder(ty, tx, k, r, q); bind_threads(sch, ty, tx); unroll_all(sch, (r, q))
        sch.decompose_reduction(b, k)
    for name in ("row_max", "row_sum"):
        i, c = sch.get_loops(sch.get_sblock(name))[-2:]
        r, ty = sch.split(i, [None, W]); q, tx = sch.split(c, [None, 32])
        sch.reorder(ty, r, tx, q); bind_threads(sch, ty, tx); unroll_all(sch, (r, q))
    return True
