# python benchmarks/triton_peers.py [names of specs and workloads]
"""Peers in Triton on CUDA: are they exact, and how long do they take by what the search found?

A line for each as soon as it is known; names given as arguments pick specs and workloads.
"""

from __future__ import annotations

import sys
import time

import torch

from deft_tvm.peers import TRITON, Gathered
from deft_tvm.peers.triton.search import milliseconds
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import parse, tensors

SPECS = {
    "gqa": "gqa:hq=32,hkv=8,d=128,dtype=bf16",
    "mla": "mla:hq=16,d=512,rope=64,dtype=bf16,scale=0.07216878364870322",
    "mha": "gqa:hq=32,hkv=32,d=128,dtype=bf16",
    "mqa": "gqa:hq=16,hkv=1,d=128,dtype=bf16",
    "gla": "gla:hq=16,hkv=2,d=256,rope=64,dtype=bf16,scale=0.07216878364870322",
    "gta": "gta:hq=32,hkv=8,d=128,rope=64,dtype=bf16",
}
MOST_COMPARED = 200_000
"""Rows times tokens that they see, beyond which float64 on the CPU would take long."""
WORKLOADS = {
    "small": "few_shot:prompt=1000,branches=9,tokens=33,vary=20",
    "drafts": "speculative:nodes=64,context=1001",
    "few_shot": "few_shot:prompt=4000,branches=32,tokens=400",
    "verify": "speculative:nodes=64,context=4000,batch=8",
    "sequences": "sequences:count=64,tokens=4096",
    "tree": "fasttree:tree=7",
}


def main(names: set[str]) -> None:
    """Everything, or what is named."""
    specs = SPECS if not names & SPECS.keys() else {n: SPECS[n] for n in SPECS if n in names}
    chosen = names & WORKLOADS.keys()
    wrong = 0
    for spec in specs.values():
        for workload in [w for n, w in WORKLOADS.items() if n in chosen or not chosen]:
            wrong += run(AttentionSpec.parse(spec), workload)
    sys.exit(wrong > 0)


def run(spec: AttentionSpec, workload: str) -> int:
    """How many of the peers are not exact."""
    case = tensors(parse(workload).forest, spec)
    gathered = Gathered(case.to("cuda"))
    exact = case.reference() if int(gathered.mask.sum()) <= MOST_COMPARED else None
    wrong = 0
    for name, peer in TRITON.items():
        begin = time.perf_counter()
        step = peer.make(gathered)
        prepared = time.perf_counter() - begin
        found = f"{spec} {workload} {name}: {1000 * milliseconds(step):.1f} µs"
        tiles = {lanes: len(each) for lanes, each in step.plan.tiles.items()}
        longest = max(int((each[:, 1] - each[:, 0]).max()) for each in step.plan.tiles.values())
        found += f", tiles {tiles} of at most {longest} tokens, {step.plan.num_partials} partials"
        found += f", {list(step.tilings.values())}, prepared in {prepared:.1f} s"
        if exact is not None:
            error = float((step().cpu().double() - exact.out).abs().max())
            bound = exact.bound(spec.dtype, spec.dtype).out
            wrong += not error <= bound
            found += f", {'exact' if error <= bound else 'WRONG'} ({error:.1e} of {bound:.1e})"
        print(found, flush=True)
    return wrong


if __name__ == "__main__":
    with torch.inference_mode():
        main(set(sys.argv[1:]))
