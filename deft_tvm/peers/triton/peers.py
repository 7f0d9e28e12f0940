"""Both peers: how each plans, and what is searched for it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.peer import no_cap_and_no_sinks
from deft_tvm.peers.triton.fasttree import LANES, fasttree
from deft_tvm.peers.triton.flatten import flatten
from deft_tvm.peers.triton.launch import Step, Tiling, block, step
from deft_tvm.peers.triton.plan import MOST_ROWS, Plan
from deft_tvm.peers.triton.search import Search, interpreted, loaded, tilings

CHUNKS = (256, 128, 512, 1024, 64)
"""Tokens of a chunk of DeFT-Flatten; the paper's is 128, and figure 15 has longer ones."""
FLATTEN_LANES = (64, 16, 32, 128)
SPLITS = (None, 64, 256, 512)
"""Tokens at which FastTree's peer cuts KV; None is the published rule, of 1024 or 128."""
MOST_LOADED = 640
"""Columns of a token and KV head: more would not fit into shared memory."""
MOST_HELD = 64 * 512
"""Elements of the output that a program holds in registers."""


def deft_flatten(gathered: Gathered) -> Step:
    """Stage 1 over even chunks, then stage 2."""
    case, spec = gathered.case, gathered.case.spec

    @cache
    def plan(chunk: int, lanes: int) -> Plan:
        return flatten(case.forest, spec.group, chunk, lanes)

    def made(choice: tuple[int, Tiling]) -> Step:
        chunk, tiling = choice
        return step(case, plan(chunk, tiling.lanes), {tiling.lanes: tiling})

    widest = min(
        MOST_HELD // block(spec.v_width), max(16, block(case.forest.num_rows * spec.group))
    )
    first = {lanes: tilings(spec, lanes) for lanes in FLATTEN_LANES if lanes <= widest}
    search = Search(made)
    tiling = next(iter(first.values()))[0]
    chunk, _ = search.fastest((chunk, tiling) for chunk in CHUNKS)
    _, tiling = search.fastest((chunk, likelier) for likelier, _ in first.values())
    _, tiling = search.fastest((chunk, each) for each in first[tiling.lanes])
    return search.settled(search.fastest((each, tiling) for each in (chunk, *CHUNKS)))


def fast_tree(gathered: Gathered) -> Step:
    """Stage 1 for nodes of many rows, then for those of few, then stage 2."""
    case, spec = gathered.case, gathered.case.spec

    @cache
    def plan(split: int | None) -> Plan:
        return fasttree(case.forest, spec.num_kv_heads, spec.group, split)

    def made(choice: tuple[int | None, Tiling, Tiling]) -> Step:
        split, many, few = choice
        return step(case, plan(split), {many.lanes: many, few.lanes: few})

    many, few = (tilings(spec, lanes) for lanes in LANES)
    search = Search(made)
    best = search.fastest((split, many[0], few[0]) for split in SPLITS)
    tiles = plan(best[0]).tiles
    if LANES[0] in tiles:
        best = search.fastest((best[0], each, best[2]) for each in many)
    if LANES[1] in tiles:
        best = search.fastest((best[0], best[1], each) for each in few)
    return search.settled(best)


def lacks(gathered: Gathered) -> str | None:
    """Why the peers cannot run a case; None where they can."""
    spec, device = gathered.case.spec, gathered.case.q.device
    if plain := no_cap_and_no_sinks(gathered):
        return plain
    if spec.window is not None:
        return "it has no window"
    if spec.dtype == "float32" or any(b.dtype != spec.dtype for b in spec.buffers):
        return "it takes q and KV of one type, bfloat16 or float16"
    if (columns := loaded(spec)) > MOST_LOADED:
        return f"it loads {columns} columns of a token and head, of which {MOST_LOADED} fit"
    if (rows := gathered.case.forest.num_rows) > MOST_ROWS:
        return f"it numbers {MOST_ROWS} rows, of which there are {rows}"
    if find_spec("triton") is None:
        return "it needs triton"
    if device.type != "cuda" and not interpreted():
        return f"KV is on {device}, and it needs CUDA"
    return None


def ordered(_: Gathered, out: Tensor) -> Tensor:
    return out
