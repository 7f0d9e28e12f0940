"""``python -m deft_tvm.gpu_check.warm``: the kernels of peers compiled, many at once.

Peers compile at their first call with an attention, up to minutes. Each with each attention does so
here in a process of its own, and leaves what it compiled in its cache, where `bench` finds it.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from deft_tvm.bench.core import Cell
from deft_tvm.gpu_check.arguments import deadline, kind_of, parser_of, use_logs
from deft_tvm.gpu_check.bench import FLEX, SLOW
from deft_tvm.gpu_check.cells import SPEEDS
from deft_tvm.gpu_check.measuring import Measuring
from deft_tvm.gpu_check.modules import build_missing
from deft_tvm.gpu_check.runner import run_aside
from deft_tvm.peers import PEERS

MODULE = "deft_tvm.gpu_check.warm"
WORKLOADS = ("few_shot:prompt=1000,branches=8", "speculative:nodes=64,context=1000", "long")
"""With and without a mask, and one row: some peers have kernels for each."""
AT_ONCE = 14


def main(specs: Sequence[str] = SPEEDS) -> None:
    """All peers that compile, with all attentions; a line each."""
    parser = parser_of(__doc__)
    parser.add_argument("--spec", help="compile this one's here, of --peer")
    parser.add_argument("--peer")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    asked = parser.parse_args()
    left = deadline(asked)
    use_logs(asked)
    if asked.spec and asked.peer:
        compile_one(Cell("", asked.spec), asked.peer, asked)
        return
    build_missing(specs, kind_of(asked))
    failed = 0
    with ThreadPoolExecutor(asked.at_once) as pool:
        futures = [
            pool.submit(_elsewhere, spec, peer, asked.device, left)
            for spec, peer in _wanted(specs, asked)
        ]
        for future in as_completed(futures):
            said, ok = future.result()
            print(said, flush=True)
            failed += not ok
    sys.exit(1 if failed else 0)


def _wanted(specs: Sequence[str], asked: Namespace) -> Iterator[tuple[str, str]]:
    """Attentions and peers that can run them."""
    for spec in specs:
        gathered = Measuring(Cell(WORKLOADS[0], spec), kind_of(asked)).gathered(0)
        for name, peer in PEERS.items():
            if name not in (*SLOW, FLEX) and not peer.lacks(gathered):
                yield spec, name


def _elsewhere(spec: str, peer: str, device: str, left: Callable[[], float]) -> tuple[str, bool]:
    """In another process: what to say of it, and whether all was well."""
    command = [sys.executable, "-m", MODULE, "--device", device, "--spec", spec, "--peer", peer]
    begin, seconds = time.monotonic(), left()
    if seconds <= 0:
        return f"no time for {peer} with {spec}", False
    status, _, said = run_aside(command, seconds)
    *_, last = ["", *(line for line in said if line.strip())]
    told = "" if status == "ok" else f": {last}"
    return f"{status} {peer} {spec}, {time.monotonic() - begin:.1f} s{told}", status == "ok"


@torch.inference_mode()
def compile_one(cell: Cell, name: str, asked: Namespace) -> None:
    """Make a peer's call, and call it, on each workload."""
    for workload in WORKLOADS:
        gathered = Measuring(cell._replace(workload=workload), kind_of(asked)).gathered(0)
        if not PEERS[name].lacks(gathered):
            PEERS[name].make(gathered)()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
