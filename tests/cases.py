"""Random forests with their caches, what attention over them is by the definition, and plans."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from hypothesis import strategies as st

from deft_tvm.device import DeviceProfile
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, make_plan
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest

SPEC = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
WIDE = (TileShape(128, 64, "float32"), TileShape(32, 64, "float32"), TileShape(4, 64, "float32"))
ARRAYS = (
    *("header", "row_order", "runs", "items", "dests"),
    *("merge_rows", "merge_indptr", "page_indices"),
)

PAGE_SIZES = (1, 4, 16, None)
TILES = (
    (TileShape(2, 4, "float32"), TileShape(16, 16, "float32")),
    (TileShape(4, 4, "float32"),),
    (TileShape(128, 8, "float32"), TileShape(8, 16, "float32"), TileShape(1, 2, "float32")),
)


@dataclass
class Case:
    """A forest in a cache. Slots that hold no token are NaN.

    Attributes:
        slots: the page and slot of each token, node by node.
        k: float64[pages, page, heads, width]; `v` and ``q [R, Hq, width]`` likewise.
    """

    forest: Forest
    pages: PageTable
    spec: AttentionSpec
    slots: list[tuple[int, int]]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def mask(self) -> np.ndarray:
        """bool[R, tokens] from parents, lengths and rows alone, a row and an ancestor at a time."""
        parents, lengths, rows = (
            getattr(self.forest, name).tolist() for name in ("parents", "lengths", "rows")
        )
        first = np.cumsum([0, *lengths])
        mask = np.zeros((sum(rows), first[-1]), bool)
        row = 0
        for node, own in enumerate(rows):
            for place in range(own):
                seen = max(0, lengths[node] - own + place + 1) if lengths[node] else 0
                mask[row, first[node] : first[node] + seen] = True
                above = parents[node]
                while above >= 0:
                    mask[row, first[above] : first[above + 1]] = True
                    above = parents[above]
                row += 1
        return mask

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and LSE by one dense masked softmax."""
        pages, slots = np.array(self.slots, int).reshape(-1, 2).T
        k, v = (np.repeat(x[pages, slots], self.spec.group, axis=1) for x in (self.k, self.v))
        scores = self.spec.scale * np.einsum("rhd,thd->rht", self.q, k)
        scores = np.where(self.mask()[:, None], scores, -np.inf)
        lse = np.logaddexp.reduce(scores, axis=-1, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None])
        return np.einsum("rht,thd->rhd", weights, v), lse


def profile(cores: int = 2, bandwidth: float = 2e10, rate: float = 2e11) -> DeviceProfile:
    rates = {"float32": rate, "bfloat16": 2 * rate}
    return msgspec.structs.replace(
        DeviceProfile.nominal(cores), read_bandwidth=bandwidth, matrix_rate=rates
    )


@st.composite
def profiles(draw) -> DeviceProfile:
    """Devices from one that only bytes slow down to one that only FLOPs do."""
    powers = st.integers(5, 12)
    return profile(draw(st.sampled_from((1, 2, 100))), 10.0 ** draw(powers), 10.0 ** draw(powers))


@st.composite
def forests(draw) -> Forest:
    """Up to nine nodes in any order; some without tokens, some with several rows or none."""
    number = draw(st.integers(1, 9))
    order = draw(st.permutations(range(number)))
    parents = [-1] * number
    for place in range(1, number):
        above = draw(st.integers(-1, place - 1))
        parents[order[place]] = order[above] if above >= 0 else -1
    lengths = [draw(st.sampled_from((0, 1, 2, 5, 9, 17, 40))) for _ in range(number)]
    rows = [draw(st.integers(0, min(4, length) if length else 2)) for length in lengths]
    return Forest.from_parents(parents, lengths, rows)


def paged(forest: Forest, page_size: int, tight: bool, seed: int) -> PageTable:
    """Pages in random order; `tight`: nodes go on in the middle of each other's pages."""
    lengths = forest.lengths.astype(int)
    if tight:
        slot = lengths.cumsum() - lengths
        total = lengths.sum()
        order = np.random.default_rng(seed).permutation(total // page_size + 1)
        spans = [
            range(s // page_size, (s + n - 1) // page_size + 1) if n else range(0)
            for s, n in zip(slot, lengths, strict=True)
        ]
        indices = [order[page] for span in spans for page in span]
        counts = [len(span) for span in spans]
        slot %= page_size
    else:
        slot = np.random.default_rng(seed).integers(0, page_size, len(lengths))
        counts = -(-(slot + lengths) // page_size)
        indices = np.random.default_rng(seed).permutation(int(counts.sum()))
    indptr = np.append(0, np.cumsum(counts))
    return PageTable(np.array(indices, int), indptr, slot, page_size=page_size)


def fill_cache(forest: Forest, pages: PageTable, page_size: int, seed: int) -> Case:
    """The forest with random q, K and V: 4 query heads, 2 KV heads, width 4."""
    spec = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=4, page_size=page_size)
    slots = []
    for node, length in enumerate(forest.lengths.tolist()):
        for t in range(length):
            entry, slot = divmod(int(pages.first_slot[node]) + t, pages.page_size)
            slots.append((int(pages.page_indices[pages.page_indptr[node] + entry]), slot))
    random = np.random.default_rng(seed)
    held = 1 + max((slot for _, slot in slots), default=0)
    k, v = (np.full((pages.max_page + 1, held, 2, 4), np.nan) for _ in range(2))
    for place in slots:
        k[place], v[place] = random.normal(size=(2, 2, 4))
    q = random.normal(size=(forest.num_rows, 4, 4))
    return Case(forest, pages, spec, slots, q, k, v)


@st.composite
def cases(draw) -> Case:
    forest, seed = draw(forests()), draw(st.integers(0, 2**16))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    if page_size is None:
        return fill_cache(forest, PageTable.contiguous(forest), 16, seed)
    return fill_cache(forest, paged(forest, page_size, draw(st.booleans()), seed), page_size, seed)


def plan_of(forest: Forest, grouping: str = "packed", spec: AttentionSpec = SPEC, **how) -> Plan:
    how = {"tiles": WIDE, "profile": profile(), **how}
    return make_plan(forest, PageTable.contiguous(forest), spec, grouping=grouping, **how)


def few_shot(prompt: int = 4000, branches: int = 32, tokens: int = 64) -> Forest:
    return Forest.from_parents([-1] + [0] * branches, [prompt] + [tokens] * branches)


def assert_same(one: Plan, other: Plan) -> None:
    assert one.launches == other.launches and one.grouping == other.grouping
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
