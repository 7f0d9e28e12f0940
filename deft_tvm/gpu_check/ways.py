"""Ways to call an attention, each of which has to give what float64 gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deft_tvm.check import Exactness, check, judge
from deft_tvm.plan import Plan
from deft_tvm.pytorch import TreeAttention
from deft_tvm.timing import LEAD_BYTES, captured
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, tensors

Way = Callable[[TreeAttention, Forest], Exactness]


def step(attention: TreeAttention, forest: Forest) -> Exactness:
    """A plan and a run."""
    return check(tensors(forest, attention.spec, device=attention.device), attention)


def contiguous(attention: TreeAttention, forest: Forest) -> Exactness:
    """A cache without pages."""
    spec, device = attention.spec, attention.device
    return check(tensors(forest, spec, contiguous=True, device=device), attention)


def by_head(attention: TreeAttention, forest: Forest) -> Exactness:
    """A cache in 8 bits with a scale for each head, and not for each page and head."""
    spec, device = attention.spec, attention.device
    return check(tensors(forest, spec, scales="head", device=device), attention)


def replay(attention: TreeAttention, forest: Forest) -> Exactness:
    """A CUDA graph of a run, replayed after the cache's contents have changed."""
    case, plan = _planned(attention, forest)
    out, lse = _results(case)
    graph = captured(lambda: attention.run(case.q, case.kv, out, lse, sinks=case.sinks))
    _renew(case)
    for result in (out, lse):
        result.fill_(torch.nan)
    graph.replay()
    return judge(case, plan, out, lse)


def stream(attention: TreeAttention, forest: Forest) -> Exactness:
    """A run on another stream, behind work there without which it would be wrong."""
    case, plan = _planned(attention, forest)
    attention.run(case.q, case.kv, sinks=case.sinks)
    busy = torch.ones(LEAD_BYTES // 4, device=case.q.device)
    other, current = torch.cuda.Stream(), torch.cuda.current_stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        for _ in range(4):  # a millisecond, in which a run on the stream before would be over
            busy.sum()
        _renew(case)
        out, lse = attention.run(case.q, case.kv, sinks=case.sinks)
    current.wait_stream(other)
    return judge(case, plan, out, lse)


def compiled(attention: TreeAttention, forest: Forest) -> Exactness:
    """A run inside a program of ``torch.compile``, on a GPU with its CUDA graphs."""
    case, plan = _planned(attention, forest)
    on_gpu = case.q.device.type == "cuda"

    def program(q: Tensor, kv: tuple[Tensor, ...], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = attention.run(q + 0, kv, sinks=sinks)
        return out + 0, lse + 0

    fast = torch.compile(program, fullgraph=True, mode="reduce-overhead" if on_gpu else None)
    with torch.inference_mode():
        for _ in range(3):  # to warm up, to capture, to replay
            out, lse = (result.clone() for result in fast(case.q, case.kv, case.sinks))
    return judge(case, plan, out, lse)


def _planned(attention: TreeAttention, forest: Forest) -> tuple[Case, Plan]:
    case = tensors(forest, attention.spec, device=attention.device)
    return case, attention.plan(forest, case.pages)


def _results(case: Case) -> tuple[Tensor, Tensor]:
    from deft_tvm.pytorch.ops import outputs

    return outputs(case.q, case.spec.v_width)


def _renew(case: Case) -> None:
    """Other numbers in q and the cache, which is not in 8 bits."""
    for tensor in (case.q, *case.buffers):
        tensor.normal_()


WAYS: dict[str, Way] = {
    way.__name__: way for way in (step, contiguous, by_head, replay, stream, compiled)
}
ON_GPUS_ALONE = ("replay", "stream")
