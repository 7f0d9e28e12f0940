"""Random operations on a `PagedKVCache`, beside a copy of all that is cached for every branch.

Slots without tokens are NaN before each step, so that whoever reads one of them shows it.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from built import artifact
from torch import Tensor

from deft_tvm.check import bound_of, largest_error
from deft_tvm.dtypes import FP8
from deft_tvm.errors import OutOfPages
from deft_tvm.pages import PageTable
from deft_tvm.pool import ROOT
from deft_tvm.pytorch import PagedKVCache, Step, load
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case

OPERATIONS = (
    *("step", "step", "step", "draft", "accept", "accept", "fork", "fork"),
    *("prune", "rewind", "read", "defragment", "resize"),
)

Layer = tuple[Tensor, ...]
"""Of each buffer ``[tokens, heads, width]``, as it is stored."""


@dataclass
class Draft:
    parents: list[int]
    layers: list[Layer]


def new_cache(layers: Sequence[AttentionSpec], num_pages: int, scale: float = 1.0) -> PagedKVCache:
    """With tested modules, and NaN in every slot."""
    runners = [load(artifact(spec)) for spec in dict.fromkeys(layers)]
    cache = PagedKVCache(layers, num_pages, attention=runners, scale=scale)
    spoil(cache, [])
    return cache


def spoil(cache: PagedKVCache, rows: list[int]) -> None:
    """Put NaN in all slots but those of tokens; of `rows`, slots, too."""
    pool = cache.pool
    kept = {slot for branch in pool.branches for slot in pool.slots(branch).tolist()}
    kept |= draft_slots(cache)
    free = sorted(set(range(pool.num_pages * pool.page_size)) - kept | set(rows))
    at = torch.tensor(free, dtype=torch.int64)
    pages, slots = at // pool.page_size, at % pool.page_size
    for spec, layer in zip(cache.layers, cache.buffers, strict=True):
        for buffer in layer:
            by_token = buffer if spec.layout == "NHD" else buffer.transpose(1, 2)
            by_token[pages, slots] = torch.tensor(torch.nan).to(buffer.dtype)


def draft_slots(cache: PagedKVCache) -> set[int]:
    forest, pages = cache.pool.forest(dict.fromkeys(cache.pool.branches, 0))
    return set(pages.row_slots(forest).tolist())


def stored(spec: AttentionSpec, new: Layer, scale: float) -> Layer:
    """What a cache keeps of elements."""
    kept = []
    for buffer, values in zip(spec.buffers, new, strict=True):
        if buffer.dtype == FP8:
            values = (values.float() / scale).clamp(-448, 448)
        kept.append(values.to(getattr(torch, buffer.dtype)))
    return tuple(kept)


def joined(*parts: Layer) -> Layer:
    """One after the other; in 8 bits torch cannot do that, so that bytes are taken."""
    return tuple(
        torch.cat([t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in column]).view(
            column[0].dtype
        )
        for column in zip(*parts, strict=True)
    )


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class CacheMachine:
    """One cache and what it should be.

    Attributes:
        copies: of each branch and layer what is cached of its path.
        drafts: of the branches that have one.
        counted: how often each operation was done, and how often pages ran out.
        worst: the largest error of a row, as a share of what rounding explains.
    """

    def __init__(
        self, layers: Sequence[AttentionSpec], num_pages: int, seed: int, scale: float = 1.0
    ) -> None:
        self.cache = new_cache(layers, num_pages, scale)
        self.pool = self.cache.pool
        self.copies: dict[int, list[Layer]] = {}
        self.drafts: dict[int, Draft] = {}
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.counted: Counter[str] = Counter()
        self.worst = 0.0

    def run(self, operations: int) -> None:
        for _ in range(operations):
            name = self.random.choice(OPERATIONS)
            if not self.copies:
                self.copies[self.pool.root()] = [self._nothing(spec) for spec in self.cache.layers]
                self.append({self.pool.branches[0]: 9}, {})
            getattr(self, f"_{name}")()
            self.counted[name] += 1

    def _nothing(self, spec: AttentionSpec) -> Layer:
        return tuple(
            torch.zeros(0, b.heads, b.width, dtype=getattr(torch, b.dtype)) for b in spec.buffers
        )

    def _settled(self) -> list[int]:
        return [branch for branch in self.copies if branch not in self.drafts]

    def _some(self, most: int) -> dict[int, int]:
        branches = self._settled()
        chosen = self.random.sample(branches, self.random.randint(0, len(branches)))
        return {branch: self.random.randint(1, most) for branch in chosen}

    def _step(self) -> None:
        self.append(self._some(self.random.choice((1, 1, 6))), {})

    def _draft(self) -> None:
        counts = self._some(2)
        sizes = {b: self.random.randint(1, 7) for b in self._settled() if b not in counts}
        self.append(counts, {
            branch: [self.random.randint(ROOT, token - 1) for token in range(size)]
            for branch, size in sizes.items()
        })  # fmt: skip

    def _accept(self) -> None:
        for branch, draft in self.drafts.items():
            path: list[int] = []
            while self.random.random() < 0.8:
                last = path[-1] if path else ROOT
                below = [t for t, parent in enumerate(draft.parents) if parent == last]
                if not below:
                    break
                path.append(self.random.choice(below))
            self.pool.accept(branch, path)
            self.copies[branch] = [
                joined(copy, tuple(t[path] for t in _bytes(layer)))
                for copy, layer in zip(self.copies[branch], draft.layers, strict=True)
            ]
        self.drafts.clear()

    def _fork(self) -> None:
        if len(self.copies) < 8 and self._settled():
            branch = self.random.choice(self._settled())
            for new in self.pool.fork(branch, self.random.randint(1, 3)):
                self.copies[new] = list(self.copies[branch])

    def _prune(self) -> None:
        gone = self.random.sample(list(self.copies), (len(self.copies) + 1) // 4)
        self.pool.prune(*gone)
        for branch in gone:
            del self.copies[branch]
            self.drafts.pop(branch, None)

    def _rewind(self) -> None:
        for branch in self._settled()[:1]:
            length = self.random.randint(0, self.pool.length(branch))
            self.pool.rewind(branch, length)
            self.copies[branch] = [tuple(t[:length] for t in copy) for copy in self.copies[branch]]

    def _defragment(self) -> None:
        self.cache.defragment()
        used = self.pool.num_pages - self.pool.num_free
        assert all(self.pool.references[:used])

    def _resize(self) -> None:
        self.cache.defragment()
        used = self.pool.num_pages - self.pool.num_free
        self.cache.resize(used + self.random.choice((0, 2, 20)))
        assert all(len(b) == self.pool.num_pages for layer in self.cache.buffers for b in layer)
        assert self.cache.bytes_in_use == used * self.cache.bytes_per_page

    def append(self, counts: dict[int, int], drafts: dict[int, list[int]]) -> None:
        """One step through all layers, each row held to the oracle over its own copy."""
        before = pickle.dumps(self.pool), [b.clone() for layer in self.cache.buffers for b in layer]
        try:
            step = self.cache.step(counts, drafts)
        except OutOfPages:
            self.counted["out of pages"] += 1
            after = [b for layer in self.cache.buffers for b in layer]
            assert pickle.dumps(self.pool) == before[0] and self.cache.pool is self.pool
            assert all(map(same_bytes, before[1], after))
            return
        spoil(self.cache, step.pages.row_slots(step.forest).tolist())
        for branch, parents in drafts.items():
            self.drafts[branch] = Draft(parents, [])
        for layer in range(len(self.cache.layers)):
            self._layer(step, layer, counts, drafts)

    def _layer(
        self, step: Step, number: int, counts: dict[int, int], drafts: dict[int, list[int]]
    ) -> None:
        spec = self.cache.layers[number]
        dtype = getattr(torch, spec.dtype)
        new = tuple(self._normal(step.num_rows, b.heads, b.width, dtype) for b in spec.buffers)
        q = self._normal(step.num_rows, spec.num_q_heads, spec.q_width, dtype)
        sinks = torch.linspace(-2, 2, spec.num_q_heads) if spec.sinks else None
        out = step.attend(number, q, *new, sinks=sinks)
        kept, row = _bytes(stored(spec, new, self.cache.scale)), 0
        for branch, count in counts.items():
            rows = slice(row, row + count)
            self.copies[branch][number] = joined(
                self.copies[branch][number], tuple(t[rows] for t in kept)
            )
            self._check(step, number, rows, q, out, sinks, self.copies[branch][number])
            row += count
        for branch, parents in drafts.items():
            own = tuple(t[row : row + len(parents)] for t in kept)
            self.drafts[branch].layers.append(own)
            for token, path in enumerate(_paths(parents)):
                seen = joined(self.copies[branch][number], tuple(t[path] for t in own))
                rows = slice(row + token, row + token + 1)
                self._check(step, number, rows, q, out, sinks, seen)
            row += len(parents)

    def _normal(self, rows: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, heads, width, generator=self.torch).to(dtype)

    def _check(
        self,
        step: Step,
        number: int,
        rows: slice,
        q: Tensor,
        out: Tensor,
        sinks: Tensor | None,
        copy: Layer,
    ) -> None:
        """The newest rows of a sequence, over its copy and nothing else."""
        spec, count, length = self.cache.layers[number], rows.stop - rows.start, len(copy[0])
        assert step.positions[rows].tolist() == list(range(length - count, length))
        forest = Forest.from_parents([-1], [length], [count])
        buffers = tuple(
            t.view(getattr(torch, b.dtype)) for t, b in zip(copy, spec.buffers, strict=True)
        )
        scales = tuple(torch.full((spec.buffers[i].heads,), self.cache.scale) for i in spec.scaled)
        table = PageTable.contiguous(forest)
        exact = Case(spec, forest, table, q[rows], buffers, scales, sinks).reference()
        plan = self.cache.attention[spec].last_plan
        assert plan is not None
        bound = bound_of(plan, exact, spec.dtype).out
        error = largest_error(out[rows], exact.out)
        self.worst = max(self.worst, error / bound if error else 0.0)
        assert error <= bound

    def _read(self) -> None:
        """Each branch reads what was written, bit for bit."""
        for branch, layers in self.copies.items():
            for number, copy in enumerate(layers):
                found = self.cache.read(branch, number)
                assert all(map(same_bytes, found, copy))


def _bytes(layer: Layer) -> Layer:
    """8-bit elements as integers, which torch can index."""
    return tuple(t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in layer)


def _paths(parents: list[int]) -> Iterator[list[int]]:
    """The tokens above each token of a draft, and itself."""
    paths: list[list[int]] = []
    for token, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent != ROOT else []), token])
    yield from paths
