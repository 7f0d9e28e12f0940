"""What is checked: which attention, on which tree, called in which way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from deft_tvm import workloads
from deft_tvm.bench.core import GLA_2, GQA_4, GQA_8, GTA, MHA, MLA, MQA
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest


class Check(NamedTuple):
    """One check.

    Attributes:
        spec: the attention.
        workload: a name in `FORESTS`, ``random:`` with a seed, or what `workloads.parse` reads.
        way: how it is called, a name in `ways.WAYS`.
    """

    spec: str
    workload: str
    way: str = "step"

    @property
    def canonical(self) -> Check:
        """With the attention as it spells itself."""
        return self._replace(spec=str(AttentionSpec.parse(self.spec)))

    def __str__(self) -> str:
        return " ".join((self.spec, self.workload, *([] if self.way == "step" else [self.way])))


WORKLOADS = (
    "few_shot:prompt=1000,branches=9,tokens=33,vary=20",
    "speculative:nodes=64,context=1001",
    "sequences:count=3,tokens=77",
)

FORESTS: dict[str, Callable[[], Forest]] = {
    # Rows of a node without tokens see its path, and of a root without tokens nothing.
    "empty_nodes": partial(
        Forest.from_parents,
        [-1, 0, 0, 1, 1, 2, -1],
        [100, 0, 20, 33, 0, 7, 0],
        [0, 1, 0, 1, 2, 1, 1],
    ),
    "deep_draft": lambda: Forest.from_choices([(0,) * (i + 1) for i in range(60)], 700),
    "several_rows": partial(
        Forest.from_parents, [-1, 0, 0, 0, 1], [1000, 20, 33, 5, 70], [3, 20, 7, 5, 70]
    ),
    "bidirectional": partial(
        Forest.from_parents, [-1, 0, 0], [300, 32, 20], [0, 32, 7], [False, True, True]
    ),
    "uneven_trees": partial(
        Forest.from_parents,
        [-1, -1, 1, 1, -1, 4, 5, 6, -1],
        [5, 1500, 1, 129, 64, 16, 15, 17, 33],
        [1, 0, 1, 1, 0, 1, 1, 1, 33],
    ),
}
RANDOM = "random:"
SEEDS = 10


def forest_of(workload: str) -> Forest:
    """The forest of a cell.

    Raises:
        WorkloadError: there is no such workload.
    """
    if workload in FORESTS:
        return FORESTS[workload]()
    if workload.startswith(RANDOM):
        return random_forest(int(workload.removeprefix(RANDOM)))
    return workloads.parse(workload).forest


def random_forest(seed: int) -> Forest:
    """One to forty nodes, any of them a root; lengths around those at which pages and tiles end."""
    random = np.random.default_rng(seed)
    number = int(random.integers(1, 41))
    above = [int(random.integers(-1, place)) if place else -1 for place in range(number)]
    order = random.permutation(number)  # callers need not name parents before children
    parents, lengths, rows = np.zeros((3, number), int)
    for place, node in enumerate(order):
        parents[node] = order[above[place]] if above[place] >= 0 else -1
        lengths[node] = random.choice((0, 1, 2, 5, 15, 16, 17, 40, 63, 64, 65, 130, 400))
        rows[node] = random.integers(0, min(9, lengths[node] + 1) if lengths[node] else 3)
    rows[order[-1]] = 1 if lengths[order[-1]] else rows[order[-1]]
    whole = random.random(number) < 0.2
    return Forest.from_parents(parents, lengths, rows, whole)


ATTENTIONS = (GQA_4, MLA, GTA, GLA_2, MHA, MQA, GQA_8)
SPEEDS = tuple(f"{attention},dtype=bf16" for attention in (GQA_4, MHA, MQA, MLA, GLA_2))
"""Attentions that are timed and tuned."""

GQA, LATENT = SPEEDS[0], SPEEDS[3]
DTYPES = (
    *(f"{attention},dtype={dtype}" for dtype in ("bf16", "f16") for attention in ATTENTIONS),
    f"{GQA_4},dtype=f32",
)
OPTIONS = (
    f"{GQA},window=100",
    f"{GQA},cap=20",
    f"{GQA},sinks=yes",
    f"{GQA},window=33,cap=30,sinks=yes",
    f"{GQA},kv_dtype=e4m3",
    f"{GQA_4},dtype=f16,kv_dtype=e4m3",
    f"{LATENT},kv_dtype=e4m3",
    f"{GTA},dtype=bf16,kv_dtype=e4m3",
    f"{GTA},dtype=bf16,window=100,sinks=yes",
)
PAGES = (
    *(f"{GQA},page={size}" for size in (1, 2, 64, 128)),
    *(f"{attention},dtype=bf16,layout=hnd" for attention in (GQA_4, GTA, GLA_2)),
    f"{GQA},page=1,layout=hnd",
    f"{LATENT},page=64",
)
SHAPES = (
    "gqa:hq=64,hkv=8,d=64,dtype=bf16,window=128,sinks=yes",  # gpt-oss
    "gqa:hq=8,hkv=4,d=256,dtype=bf16,cap=50,window=512",  # Gemma 2
    "gqa:hq=28,hkv=4,d=128,dtype=bf16",  # Qwen2: a group of 7
    "gqa:hq=9,hkv=3,d=64,dtype=bf16",  # SmolLM2
    "gqa:hq=4,hkv=2,d=72,dtype=bf16",  # no multiple of 16
    "gqa:hq=32,hkv=1,d=128,dtype=bf16",
    MLA.replace("hq=16", "hq=128") + ",dtype=bf16",  # DeepSeek-V3
)
ALL = (*DTYPES, *OPTIONS, *PAGES, *SHAPES)
THOROUGH = (
    *(GQA, LATENT, f"{GTA},dtype=f16", f"{GQA_4},dtype=f32", f"{GLA_2},dtype=bf16"),
    *(OPTIONS[3], OPTIONS[4], OPTIONS[6], PAGES[0], PAGES[4], SHAPES[2]),
)
"""Attentions that differ in what kernels do; all trees are for them."""

DIFFERENT = tuple(dict.fromkeys((*SPEEDS, *THOROUGH, SHAPES[1], SHAPES[4])))
"""Attentions whose kernels have something of their own."""

CELLS = (
    *(Check(spec, workload) for spec in ALL for workload in WORKLOADS),
    *(Check(spec, name) for spec in THOROUGH for name in (*FORESTS, "forest:trees=8,prompt=100")),
    *(Check(spec, f"{RANDOM}{seed}") for spec in THOROUGH for seed in range(SEEDS)),
    *(Check(spec, WORKLOADS[0], "contiguous") for spec in (GQA, LATENT, OPTIONS[4])),
    *(Check(spec, WORKLOADS[0], "by_head") for spec in ALL if "e4m3" in spec),
    *(Check(s, w, "replay") for s in (GQA, LATENT, OPTIONS[3]) for w in WORKLOADS[:2]),
    *(Check(spec, WORKLOADS[0], "stream") for spec in (GQA, LATENT)),
    *(Check(spec, WORKLOADS[0], "compiled") for spec in (GQA, LATENT)),
)
