# python benchmarks/overhead.py
"""Microseconds of everything but attention: planning a draft tree of 64 nodes, and a run's call."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from deft_tvm import AttentionSpec, Forest, PageTable, TreeAttention
from deft_tvm.pytorch.checks import check_inputs, check_outputs, check_types
from deft_tvm.pytorch.eager import is_plain
from deft_tvm.pytorch.ops import TREE_ATTENTION_OUT
from deft_tvm.timing import measure
from deft_tvm.workloads import parse, tensors
from deft_tvm.workloads.tensors import shuffled_pages

spec = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
attention = TreeAttention(spec)


def show(title: str, calls: dict[str, Callable[[], object]]) -> None:
    """Medians of each call in a loop of its own, as layer follows layer, and of all in turn."""
    in_turn = measure(calls, warmup=20)
    print(f"{title:44}{'alone':>10}{'in turn':>10}  µs")
    for name, call in calls.items():
        alone = measure({name: call}, budget=0.5, warmup=50)[name]
        print(f"  {name:42}{1e6 * alone.median:10.1f}{1e6 * in_turn[name].median:10.1f}")


draft = parse("speculative:nodes=64,context=1000").forest
grown = draft.with_lengths(draft.lengths + (draft.parents < 0))
pages = shuffled_pages(grown, spec)
topology = (draft.parents, draft.lengths, draft.rows)
table = (pages.page_indices, pages.page_indptr, pages.first_slot)


def new_forest() -> Forest:
    return Forest.from_parents(*topology)


def new_pages() -> PageTable:
    return PageTable(*table, page_size=spec.page_size)


attention.plan(draft, pages)
steps = cycle((grown, draft))
show(
    "planning: a draft tree of 64 nodes",
    {
        "plan": lambda: attention.plan(draft, pages),
        "plan, new Forest and PageTable": lambda: attention.plan(new_forest(), new_pages()),
        "  Forest.from_parents": new_forest,
        "  PageTable": new_pages,
        "update(Forest)": lambda: attention.update(next(steps)),
        "update(lengths)": lambda: attention.update(next(steps).lengths),
    },
)

case = tensors(Forest.from_parents([-1], [1]), spec)
attention.plan(case.forest, case.pages)
out, lse = attention.run(case.q, case.kv)
q, kv, loaded, step = case.q, case.kv, attention._loaded, attention._planned("run").packed
with torch.inference_mode():
    show(
        "a run of one row over one token",
        {
            "run": lambda: attention.run(q, kv, out, lse),
            "  check_types": lambda: check_types(spec, q, kv, None),
            "  is_plain": lambda: is_plain(q, kv, out, lse),
            "  check_inputs": lambda: check_inputs(loaded, step, q, kv),
            "  check_outputs": lambda: check_outputs(loaded, step, out, lse),
            "run, new outputs": lambda: attention.run(q, kv),
            "the operator, by torch's dispatcher": lambda: TREE_ATTENTION_OUT(
                q, kv, *attention.operands, out, lse
            ),
            "torch.add(out=)": lambda: torch.add(lse, lse, out=lse),
        },
    )
    torch.set_num_threads(1)
    show("on one thread", {"run": lambda: attention.run(q, kv, out, lse)})
