"""Random forests with their caches, what attention over them is by the definition, and plans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
from hypothesis import strategies as st

from deft_tvm.device import DeviceProfile
from deft_tvm.dtypes import Dtype
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, make_plan
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.tree import Forest

SPEC = AttentionSpec.gqa(num_q_heads=32, num_kv_heads=8, head_dim=128)
WIDE = (TileShape(128, 64, "float32"), TileShape(32, 64, "float32"), TileShape(4, 64, "float32"))
ARRAYS = (
    *("header", "row_order", "row_positions", "runs", "items", "dests"),
    *("merge_rows", "merge_indptr", "page_indices"),
)

PAGE_SIZES = (1, 4, 16, None)
TILES = (
    (TileShape(2, 4, "float32"), TileShape(16, 16, "float32")),
    (TileShape(4, 4, "float32", heads=2),),
    (TileShape(128, 8, "float32"), TileShape(8, 16, "float32"), TileShape(1, 2, "float32")),
)


def plain(page_size: int, dtype: Dtype = "float32") -> AttentionSpec:
    return AttentionSpec.gqa(
        num_q_heads=4, num_kv_heads=2, head_dim=4, dtype=dtype, page_size=page_size
    )


def tied(page_size: int) -> AttentionSpec:
    """K is in the middle of V, and both heads share a rope; no two types have to be the same."""
    return AttentionSpec(
        num_q_heads=4,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 8, "bfloat16"), CacheBuffer("rope", 1, 3, "float32")),
        k=Region(0, 2, 7),
        v=Region(0, 0, 8),
        rope=1,
        scale=0.4,
        dtype="float16",
        page_size=page_size,
    )


SPECS = (plain, partial(plain, dtype="bfloat16"), tied)
"""Each a function of the page size. Numbers are float64 whatever the types; bytes follow them."""


@dataclass
class Case:
    """A forest in a cache. Slots that hold no token are NaN.

    Attributes:
        slots: the page and slot of each token, node by node.
        q: float64[R, Hq, q_width].
        buffers: in the order of ``spec.buffers``, each float64[pages, page, heads, width].
    """

    forest: Forest
    pages: PageTable
    spec: AttentionSpec
    slots: list[tuple[int, int]]
    q: np.ndarray
    buffers: tuple[np.ndarray, ...]

    def mask(self) -> np.ndarray:
        """bool[R, tokens] from what the nodes were made of, a row and an ancestor at a time."""
        parents, lengths, rows, whole = (
            getattr(self.forest, name).tolist()
            for name in ("parents", "lengths", "rows", "bidirectional")
        )
        first = np.cumsum([0, *lengths])
        mask = np.zeros((sum(rows), first[-1]), bool)
        row = 0
        for node, own in enumerate(rows):
            for place in range(own):
                later = 0 if whole[node] else own - place - 1
                seen = max(0, lengths[node] - later) if lengths[node] else 0
                mask[row, first[node] : first[node] + seen] = True
                above, start = parents[node], 0
                while above >= 0:
                    mask[row, first[above] : first[above + 1]] = True
                    start += lengths[above]
                    above = parents[above]
                position = start + (lengths[node] - own + place if lengths[node] else -1)
                if self.spec.window is not None:
                    self._cut(mask[row], node, start, position - self.spec.window)
                row += 1
        return mask

    def _cut(self, seen: np.ndarray, node: int, start: int, last_past: int) -> None:
        """Unsee the path's tokens up to position `last_past`; `node` begins at `start`."""
        lengths, first = self.forest.lengths, np.cumsum([0, *self.forest.lengths])
        while node >= 0:
            past = int(np.clip(last_past + 1 - start, 0, lengths[node]))
            seen[first[node] : first[node] + past] = False
            node = int(self.forest.parents[node])
            start -= int(lengths[node]) if node >= 0 else 0

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and LSE by one dense masked softmax."""
        k, v = (np.repeat(x, self.spec.group, axis=1) for x in self._keys_and_values())
        scores = self.spec.scale * np.einsum("rhd,thd->rht", self.q, k)
        scores = np.where(self.mask()[:, None], scores, -np.inf)
        lse = np.logaddexp.reduce(scores, axis=-1, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0)[..., None])
        return np.einsum("rht,thd->rhd", weights, v), lse

    def _keys_and_values(self) -> tuple[np.ndarray, np.ndarray]:
        """[tokens, Hkv, q_width] and [tokens, Hkv, v_width]."""
        spec = self.spec
        pages, slots = np.array(self.slots, int).reshape(-1, 2).T
        tokens = [buffer[pages, slots] for buffer in self.buffers]
        k, v = (tokens[part.buffer][..., part.begin : part.end] for part in (spec.k, spec.v))
        if spec.rope is not None:
            shape = (len(self.slots), spec.num_kv_heads, spec.rope_width)
            k = np.concatenate([k, np.broadcast_to(tokens[spec.rope], shape)], axis=-1)
        return k, v


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
    bidirectional = [draw(st.integers(0, 3)) == 0 for _ in range(number)]
    return Forest.from_parents(parents, lengths, rows, bidirectional)


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


def fill_cache(forest: Forest, pages: PageTable, spec: AttentionSpec, seed: int) -> Case:
    """The forest with random q and caches."""
    slots = []
    for node, length in enumerate(forest.lengths.tolist()):
        for t in range(length):
            entry, slot = divmod(int(pages.first_slot[node]) + t, pages.page_size)
            slots.append((int(pages.page_indices[pages.page_indptr[node] + entry]), slot))
    random = np.random.default_rng(seed)
    held = 1 + max((slot for _, slot in slots), default=0)
    shape = (pages.max_page + 1, held)
    buffers = tuple(np.full((*shape, b.heads, b.width), np.nan) for b in spec.buffers)
    for place in slots:
        for buffer in buffers:
            buffer[place] = random.normal(size=buffer.shape[2:])
    q = random.normal(size=(forest.num_rows, spec.num_q_heads, spec.q_width))
    return Case(forest, pages, spec, slots, q, buffers)


@st.composite
def cases(draw) -> Case:
    forest, seed = draw(forests()), draw(st.integers(0, 2**16))
    page_size, spec = draw(st.sampled_from(PAGE_SIZES)), draw(st.sampled_from(SPECS))
    window = draw(st.sampled_from((None, None, 1, 2, 7, 30)))
    whole = replace(spec(page_size or 16), window=window)
    if page_size is None:
        return fill_cache(forest, PageTable.contiguous(forest), whole, seed)
    pages = paged(forest, page_size, draw(st.booleans()), seed)
    return fill_cache(forest, pages, whole, seed)


def plan_of(forest: Forest, grouping: str = "packed", spec: AttentionSpec = SPEC, **how) -> Plan:
    how = {"tiles": WIDE, "profile": profile(), **how}
    return make_plan(forest, PageTable.contiguous(forest), spec, grouping=grouping, **how)


def few_shot(prompt: int = 4000, branches: int = 32, tokens: int = 64) -> Forest:
    return Forest.from_parents([-1] + [0] * branches, [prompt] + [tokens] * branches)


def assert_same(one: Plan, other: Plan) -> None:
    assert one.launches == other.launches and one.grouping == other.grouping
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
