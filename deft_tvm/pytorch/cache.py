"""KV of all layers in pages, which branches of a tree share, and one step of attention over it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deft_tvm.arrays import whole
from deft_tvm.errors import InputError, PageError, SpecError
from deft_tvm.fp8 import MOST
from deft_tvm.pages import PageTable
from deft_tvm.pool import PagePool
from deft_tvm.pytorch.attention import TreeAttention
from deft_tvm.pytorch.gradients import refuse_gradient
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest


class PagedKVCache:
    """The caches of a model's layers over one `PagePool`; a plan serves all layers of one spec.

    Branches are those of `pool`, which may be forked, pruned and rewound between steps. Then, for
    each step of the model::

        step = cache.step({branch: 1, other: 1})  # room for a token each, and a plan
        for layer in ...:
            out = step.attend(layer, q, k, v)     # k and v are written, then attended to

    Attributes:
        layers: the attention of each layer.
        pool: pages and branches.
        buffers: of each layer its tensors in the order of ``spec.buffers``, each ``[pages,
            page_size, heads, width]``, in layout HND ``[pages, heads, page_size, width]``.
        attention: of each distinct spec what runs it.
        device: where the tensors live.
        scale: by which elements of buffers in 8 bits are multiplied when they are read.
    """

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        num_pages: int,
        device: torch.device | str = "cpu",
        *,
        attention: Iterable[TreeAttention] = (),
        scale: float = 1.0,
    ) -> None:
        """Empty caches of so many pages.

        Args:
            layers: the attention of each layer, `deft_tvm.models.layers` of a model; all of one
                page size.
            num_pages: pages of each layer, `pages_for` says how many tokens need.
            device: where the tensors live.
            attention: what runs specs of `layers`, instead of the best module for each; the cache
                takes copies, which follow its own plans.
            scale: see the attributes.

        Raises:
            SpecError: there are no layers, or they have different page sizes; `scale` is no finite
                number above zero.
            InputError: one of `attention` is for none of `layers`.
            PageError: `num_pages` is no whole number, or negative.
            ArtifactError, CompilerMissing: as `TreeAttention`.
        """
        sizes = sorted({spec.page_size for spec in layers})
        if len(sizes) != 1:
            raise SpecError(f"layers have page sizes {sizes}; expected one for all of them")
        if not (math.isfinite(scale) and scale > 0):
            raise SpecError(f"scale is {scale}; expected a finite number above zero")
        self.layers = tuple(layers)
        self.device = torch.device(device)
        self.pool = PagePool(num_pages, sizes[0])
        self.attention = runners(self.layers, self.device, attention)
        self.scale = scale
        self.buffers = [self._zeros(spec, num_pages) for spec in self.layers]
        self._scales = [
            [self._scales_of(spec.buffers[i].heads) for i in spec.scaled] for spec in self.layers
        ]

    def __repr__(self) -> str:
        return f"PagedKVCache(layers={len(self.layers)}, {self.pool})"

    @property
    def bytes_per_page(self) -> int:
        """Bytes that a page takes in all layers together."""
        tokens = sum(spec.kv_bytes_per_token for spec in self.layers)
        return self.pool.page_size * tokens

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that branches hold, in all layers."""
        return (self.pool.num_pages - self.pool.num_free) * self.bytes_per_page

    def pages_for(self, tokens: int) -> int:
        """Pages that one branch of so many tokens needs."""
        return -(-tokens // self.pool.page_size)

    def step(
        self, counts: Mapping[int, int], drafts: Mapping[int, Sequence[int]] | None = None
    ) -> Step:
        """Room for new tokens, each of them a row, and a plan of attention for these rows.

        The branches must stay as they are until all layers have run. After a step with drafts,
        `PagePool.accept` says what of each is kept.

        Args:
            counts: for each branch that grows, by how many tokens.
            drafts: for each other branch that tries some, the parents of its draft's tokens, see
                `PagePool.append`.

        Raises:
            PageError: see `PagePool.append`.
            OutOfPages: there are too few free pages.
            PlanError: see `TreeAttention.plan`.

        Whatever is raised, the branches are as they were.
        """
        self.pool.append(counts, drafts)
        try:
            sizes = {branch: len(parents) for branch, parents in (drafts or {}).items()}
            forest, pages = self.pool.forest({**counts, **sizes})
            self.settle()
            return Step(self, forest, pages)
        except BaseException:
            for branch in drafts or {}:
                self.pool.accept(branch, ())
            for branch, count in counts.items():
                self.pool.rewind(branch, self.pool.length(branch) - count)
            raise

    def settle(self) -> None:
        """Copy what the pool wants copied; `step` and `read` do it by themselves."""
        source, target = self.pool.moves
        if len(source):
            here, there = self._places(source), self._places(target)
            # All is read before any is written or forgotten: without memory nothing is lost.
            copies = [(tensor, tensor[here]) for tensor in self._by_token()]
            for tensor, tokens in copies:
                tensor[there] = tokens
            self.pool.take_moves()

    def read(self, branch: int, layer: int) -> tuple[Tensor, ...]:
        """What is cached of a branch's path: of each buffer a copy, ``[tokens, heads, width]``.

        Raises:
            PageError: there is no such branch.
            InputError: there is no such layer.
        """
        spec = self._spec_of(layer)
        self.settle()
        places = self._places(self.pool.slots(branch))
        return tuple(_by_token(spec, tensor)[places] for tensor in self.buffers[layer])

    def defragment(self) -> None:
        """Bring the pages in use to the front, a path's pages one after another."""
        self.settle()
        order = torch.from_numpy(self.pool.defragment().astype(np.int64)).to(self.device)
        for layer in self.buffers:
            for tensor in layer:
                tensor[: len(order)] = tensor[order]

    def resize(self, num_pages: int) -> None:
        """Have more pages, or fewer; tensors are made anew and what is in use is kept.

        Raises:
            PageError: `num_pages` is no whole number or negative, or a page that would go is in
                use: `defragment` before.
        """
        num_pages = whole("num_pages", num_pages, PageError)
        self.settle()
        # If memory does not suffice for more, no page is beyond what all layers have.
        if num_pages <= self.pool.num_pages:
            self.pool.resize(num_pages)
        for number, spec in enumerate(self.layers):
            new = self._zeros(spec, num_pages)
            for tensor, old in zip(new, self.buffers[number], strict=True):
                kept = min(len(old), num_pages)
                tensor[:kept] = old[:kept]
            self.buffers[number] = new
        self.pool.resize(num_pages)

    @torch.inference_mode(False)
    def _zeros(self, spec: AttentionSpec, num_pages: int) -> tuple[Tensor, ...]:
        """Buffers of a layer; ordinary tensors, which can be written to in every mode."""
        shapes = (
            (spec.page_size, b.heads) if spec.layout == "NHD" else (b.heads, spec.page_size)
            for b in spec.buffers
        )
        return tuple(
            torch.zeros(
                (num_pages, *shape, buffer.width),
                dtype=getattr(torch, buffer.dtype),
                device=self.device,
            )
            for shape, buffer in zip(shapes, spec.buffers, strict=True)
        )

    def _scales_of(self, heads: int) -> Tensor:
        return torch.full((heads,), self.scale, dtype=torch.float32, device=self.device)

    def _spec_of(self, layer: int) -> AttentionSpec:
        if layer not in range(len(self.layers)):
            raise InputError(f"layer is {layer!r}; expected 0 to {len(self.layers) - 1}")
        return self.layers[layer]

    def _by_token(self) -> Iterable[Tensor]:
        for spec, layer in zip(self.layers, self.buffers, strict=True):
            yield from (_by_token(spec, tensor) for tensor in layer)

    def _places(self, slots: np.ndarray) -> tuple[Tensor, Tensor]:
        """Page, and slot in it, of slots that are counted through all pages."""
        at = torch.from_numpy(slots).to(self.device)
        return at // self.pool.page_size, at % self.pool.page_size


class Step:
    """One step of a model over a `PagedKVCache`: its rows, in the order in which branches came.

    Attributes:
        cache: whose step it is.
        forest: what the rows see.
        pages: where it lies.
        plans: of each distinct spec of the layers, the plan that its runs follow.
        positions: int64[rows], position of each row on its path.
    """

    def __init__(self, cache: PagedKVCache, forest: Forest, pages: PageTable) -> None:
        self.cache = cache
        self.forest = forest
        self.pages = pages
        self.plans = {
            spec: attention.plan(forest, pages) for spec, attention in cache.attention.items()
        }
        self._places = cache._places(pages.row_slots(forest))
        positions = np.empty(forest.num_rows, np.int64)
        positions[forest.row_order] = forest.row_positions
        self.positions = torch.from_numpy(positions).to(cache.device)

    @property
    def num_rows(self) -> int:
        return self.forest.num_rows

    def attend(self, layer: int, q: Tensor, *new: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Cache the rows' K and V in one layer, and let the rows attend.

        Args:
            layer: its number.
            q: ``[rows, query heads, q_width]``, rotated already.
            new: the rows' own elements of each buffer of the layer's spec, ``[rows, heads,
                width]``: K and V, or state and rope.
            sinks: as in `TreeAttention.run`.

        Returns:
            ``[rows, query heads, v_width]``.

        Raises:
            InputError: there is no such layer, or a tensor does not fit or requires grad.
        """
        self.write(layer, *new)
        return self.run(layer, q, sinks=sinks)[0]

    def write(self, layer: int, *new: Tensor) -> None:
        """Cache the rows' own elements in one layer; see `attend`.

        Raises:
            InputError: there is no such layer, or a tensor does not fit or requires grad.
        """
        spec, buffers = self.cache._spec_of(layer), self.cache.buffers[layer]
        if len(new) != len(buffers):
            names = ", ".join(buffer.name for buffer in spec.buffers)
            raise InputError(f"new has {len(new)} tensors; expected one for each of {names}")
        for buffer, tensor, values in zip(spec.buffers, buffers, new, strict=True):
            shape = (self.num_rows, buffer.heads, buffer.width)
            if not isinstance(values, Tensor):
                raise InputError(
                    f"new {buffer.name} is {type(values).__name__}; expected a torch.Tensor"
                )
            if values.shape != shape:
                raise InputError(
                    f"new {buffer.name} has shape {tuple(values.shape)}; expected {shape}"
                )
            if not values.is_floating_point():
                raise InputError(
                    f"new {buffer.name} has dtype {values.dtype}; expected a float dtype"
                )
            if values.requires_grad and torch.is_grad_enabled():
                refuse_gradient(f"new {buffer.name}")
            if buffer.scaled:
                # In float32, as a quotient in 16 bits would be rounded twice.
                values = (values.float() / self.cache.scale).clamp(-MOST, MOST)
            _by_token(spec, tensor)[self._places] = values.to(tensor.dtype)

    def run(self, layer: int, q: Tensor, *, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`TreeAttention.run` over what is cached in one layer; it raises the same errors."""
        cache, spec = self.cache, self.cache._spec_of(layer)
        attention = cache.attention[spec]
        # A later step may have planned already.
        if not torch.compiler.is_compiling() and attention.last_plan is not self.plans[spec]:
            attention.use(self.plans[spec])
        return attention.run(q, (*cache.buffers[layer], *cache._scales[layer]), sinks=sinks)


def runners(
    layers: Iterable[AttentionSpec],
    device: torch.device | str,
    attention: Iterable[TreeAttention] = (),
) -> dict[AttentionSpec, TreeAttention]:
    """What runs each distinct spec: copies of `attention` where there are any, else the best.

    Raises:
        InputError: one of `attention` is for none of `layers`.
    """
    distinct = dict.fromkeys(layers)
    given = {runner.spec: runner for runner in attention}
    for spec in given.keys() - distinct.keys():
        wanted = ", ".join(map(str, distinct))
        raise InputError(f"attention has one for {spec}; expected {wanted}")
    return {
        spec: given[spec].copy() if spec in given else TreeAttention(spec, device=device)
        for spec in distinct
    }


def _by_token(spec: AttentionSpec, tensor: Tensor) -> Tensor:
    """``[pages, page_size, heads, width]`` in either layout."""
    return tensor if spec.layout == "NHD" else tensor.transpose(1, 2)
