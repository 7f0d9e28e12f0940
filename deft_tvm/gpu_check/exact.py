"""``python -m deft_tvm.gpu_check.exact``: one step of every attention beside float64.

A line for each, as soon as it is known; exits with 1 if one is further away than rounding explains,
or cannot be run.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from deft_tvm.check import Exactness, check
from deft_tvm.gpu_check.arguments import device_of
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import Case, parse, tensors

T = TypeVar("T")

SPECS = (
    "gqa:hq=32,hkv=8,d=128,dtype=bf16",
    "gqa:hq=32,hkv=8,d=128,dtype=f16",
    "gqa:hq=32,hkv=8,d=128,dtype=f32",
    "gqa:hq=32,hkv=32,d=128,dtype=bf16",
    "gqa:hq=16,hkv=1,d=128,dtype=bf16",
    "gta:hq=32,hkv=8,d=128,rope=64,dtype=bf16",
    "gla:hq=16,hkv=2,d=256,rope=64,dtype=bf16,scale=0.07216878364870322",
    "mla:hq=16,d=512,rope=64,dtype=bf16,scale=0.07216878364870322",
)
WORKLOADS = (
    "few_shot:prompt=1000,branches=9,tokens=33,vary=20",
    "speculative:nodes=64,context=1001",
    "sequences:count=3,tokens=77",
)


def main(specs: Sequence[str] = SPECS, workloads: Sequence[str] = WORKLOADS) -> None:
    """Every attention on every workload."""
    device = device_of(__doc__)
    wrong = 0
    for told, found in results(specs, workloads, device):
        holds = isinstance(found, Exactness) and found.holds
        wrong += not holds
        print(f"{'exact' if holds else 'WRONG'} {told}: {found}", flush=True)
    print(f"{wrong} of {len(specs) * len(workloads)} are not exact")
    sys.exit(1 if wrong else 0)


def results(
    specs: Sequence[str], workloads: Sequence[str], device: str
) -> Iterator[tuple[str, Exactness | str]]:
    """What was compared, and how near it is or why there is nothing to compare."""
    for text in specs:
        spec = AttentionSpec.parse(text)
        # Once for all workloads: a build that fails takes as long as one that does not.
        attention = attempt(partial(TreeAttention, spec, device=device))
        for workload in workloads:
            if isinstance(attention, str):
                yield f"{spec} {workload}", attention
            else:
                yield f"{spec} {workload}", attempt(partial(compared, attention, workload))


def compared(attention: TreeAttention, workload: str) -> Exactness:
    """One step of an attention beside float64."""
    case = tensors(parse(workload).forest, attention.spec)
    return check(moved(case, attention.device), attention)


def attempt(call: Callable[[], T]) -> T | str:
    """What a call returns, or its traceback: the other attentions may still be right."""
    try:
        return call()
    except Exception:
        return traceback.format_exc()


def moved(case: Case, device: str | torch.device) -> Case:
    """The same tensors on a device."""
    return replace(
        case,
        q=case.q.to(device),
        buffers=tuple(buffer.to(device) for buffer in case.buffers),
        scales=tuple(scales.to(device) for scales in case.scales),
        sinks=None if case.sinks is None else case.sinks.to(device),
    )


if __name__ == "__main__":
    main()
