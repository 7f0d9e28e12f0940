"""From a forest to a plan: choose a grouping, cut it into items, lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from deft_tvm.errors import PlanError
from deft_tvm.plan.buffer import PlanBuffer
from deft_tvm.plan.compiled import GROUPINGS as COMPILED
from deft_tvm.plan.compiled import Compiled
from deft_tvm.plan.cost import CostModel, Floats, Ints, Prices, prices
from deft_tvm.plan.fill import Cut, fill
from deft_tvm.plan.layout import (
    Laid,
    Partials,
    Plan,
    lay_out_header,
    lay_out_items,
    lay_out_runs,
    number_partials,
)
from deft_tvm.plan.packed import packed
from deft_tvm.plan.split import (
    Groups,
    Walk,
    by_node,
    by_sequence,
    cut_rows,
    cut_tokens,
    cut_window,
    flattened,
)
from deft_tvm.spec import AttentionSpec, TileShape

if TYPE_CHECKING:
    import tvm_ffi

    from deft_tvm.device import DeviceProfile
    from deft_tvm.pages import PageTable
    from deft_tvm.tree import Forest

GROUPINGS = ("node", "node_chunk", "flatten", "sequence", "packed", "auto")

PAPER_CHUNK = 128
"""Tokens at which DeFT cuts nodes (`MAX_BLOCK_LEN`) and the flattened tree (`BLOCK_LEN`)."""

DETERMINISTIC_CHUNK = 512
"""Tokens at which `deterministic` cuts. Part of what users rely on: another number, other bits."""


def make_plan(
    forest: Forest,
    pages: PageTable,
    spec: AttentionSpec,
    tiles: Sequence[TileShape],
    profile: DeviceProfile,
    grouping: str = "auto",
    chunk: int | None = None,
    deterministic: bool = False,
) -> Plan:
    """The work items of one step of tree attention. Every grouping is exact.

    Args:
        forest: the trees, with lengths and rows.
        pages: where each node's tokens lie.
        spec: the attention; only its group, widths, dtypes and page size matter.
        tiles: the tile classes that there are kernels for; items go to the cheapest that holds
            them, and more rows than the largest holds are cut in blocks.
        profile: the device whose rates price the alternatives.
        grouping: ``node``, ``node_chunk`` or ``flatten`` as in the DeFT paper; ``sequence``, every
            path for itself; ``packed``, by cost; ``auto``, the cheaper of the last two (the first
            three are where ``packed`` starts or what it finds, at a fixed chunk).
        chunk: tokens at which groups are cut. The default is 128 for ``node_chunk`` and
            ``flatten``, and for ``sequence`` and ``packed`` what fills the machine; ``node`` is
            never cut.
        deterministic: fix items and their order by the row's own tree alone, whatever else is in
            the forest, the device and its prices: nodes are cut every 512 tokens (or `chunk`),
            and an item takes the smallest tile class that holds its rows. For ``auto`` (which
            then is ``node_chunk``), ``node``, ``node_chunk`` and ``sequence``.

    Raises:
        PlanError: an unknown grouping, a chunk that is not positive or not wanted, no usable tile
            class, pages of another size than the spec's, or a window on a part of a forest.
        PageError: `pages` does not hold the tokens of `forest`.
    """
    recipe = make_recipe(spec, tiles, profile, grouping, chunk, deterministic)
    return recipe(forest, pages)


def make_recipe(
    spec: AttentionSpec,
    tiles: Sequence[TileShape],
    profile: DeviceProfile,
    grouping: str = "auto",
    chunk: int | None = None,
    deterministic: bool = False,
    planner: tvm_ffi.Function | None = None,
) -> Recipe:
    """What makes plans of any forest and pages; see `make_plan`, and `Recipe` for `planner`.

    Raises:
        PlanError: an unknown grouping, a chunk that is not positive or not wanted, or no usable
            tile class.
    """
    _check(grouping, chunk, deterministic)
    if deterministic:
        grouping = "node_chunk" if grouping == "auto" else grouping
        chunk = chunk or DETERMINISTIC_CHUNK
    elif grouping in ("node_chunk", "flatten"):
        chunk = chunk or PAPER_CHUNK
    costs = prices(spec, tuple(tiles), CostModel.from_profile(profile))
    return Recipe(
        prices=costs,
        tiles=tuple(tiles),
        group=spec.group,
        window=spec.window,
        page_size=spec.page_size,
        grouping=grouping,
        chunk=chunk,
        deterministic=deterministic,
        planner=planner,
    )


@dataclass(frozen=True, eq=False)
class Recipe:
    """What a plan was asked for, so that `Plan.update` can ask for it again.

    Attributes:
        prices: costs of items on the device.
        tiles: the tile classes.
        group: query heads a KV head.
        window: positions that a row sees; None for all.
        page_size: tokens a page, where the cache has any.
        grouping: one of `GROUPINGS`.
        chunk: tokens at which groups are cut; None: to fill the machine.
        deterministic: nothing may depend on `prices`.
        planner: a module's compiled planner, which is faster; see `deft_tvm.plan.compiled`.
    """

    prices: Prices
    tiles: tuple[TileShape, ...]
    group: int
    window: int | None
    page_size: int
    grouping: str
    chunk: int | None
    deterministic: bool
    planner: tvm_ffi.Function | None = None

    def __getstate__(self) -> dict[str, Any]:
        """In another process plans are made by `planner` no more, and are the same."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"planner": None}

    def __call__(self, forest: Forest, pages: PageTable, previous: Plan | None = None) -> Plan:
        """The plan of `forest`; what `previous` numbered alike is taken from it."""
        if not pages.is_contiguous and pages.page_size != self.page_size:
            raise PlanError(
                f"pages have page_size {pages.page_size}; expected the spec's, which is "
                f"{self.page_size}, or PageTable.contiguous"
            )
        laid: Laid | PlanBuffer
        if self._compiled is not None:
            laid = self._compiled(forest, pages)
        else:
            laid = self._in_python(forest, pages, previous)
        settled = self if laid.grouping == self.grouping else self._settled[laid.grouping]
        return Plan(laid, forest, pages, settled)

    @cached_property
    def _compiled(self) -> Compiled | None:
        """The compiled planner, if there is one and it makes such plans."""
        plain = self.window is None and self.chunk is None and not self.deterministic
        if self.planner is None or not plain or self.grouping not in COMPILED:
            return None
        return Compiled(self.planner, self.prices, self.grouping)

    @cached_property
    def _settled(self) -> dict[str, Recipe]:
        """The same with either of the groupings among which ``auto`` chooses."""
        return {name: replace(self, grouping=name) for name in ("packed", "sequence")}

    def _in_python(self, forest: Forest, pages: PageTable, previous: Plan | None) -> Laid:
        """What the compiled planner writes, by array operations."""
        pages.check(forest)
        if forest.is_part and self.window is not None:
            raise PlanError(
                f"window is {self.window}; expected None, as positions in a part of a forest are "
                f"not known"
            )
        walk = Walk.of(forest, self.window)
        grouping, whole, cut = self._choose(walk)
        groups = self._cut_rows(walk, cut_tokens(walk, whole, cut.chunk))
        groups = cut_window(walk, groups)
        tile, cost = cut.tiles if cut.tiles and groups is whole else self._assign(groups)
        if not self.deterministic:
            tile, cost = self.prices.joined(groups.tokens, groups.rows, tile, cost)
        items, launches = lay_out_items(walk, groups, tile, cost, len(self.tiles))
        partials = _reused(previous, groups) or number_partials(groups, forest.row_order)
        return Laid(
            grouping=grouping,
            header=lay_out_header(groups, pages),
            row_positions=walk.positions,
            runs=lay_out_runs(walk, groups, pages),
            items=items,
            launches=launches,
            dests=partials.dests,
            merge_rows=partials.merge_rows,
            merge_indptr=partials.merge_indptr,
            groups=groups if self.window is None else groups.moved(walk.skip),
        )

    def _choose(self, walk: Walk) -> tuple[str, Groups, Cut]:
        """The grouping by name, its groups, and how to cut them."""
        if self.grouping == "auto":
            return self._cheaper(walk)
        groups = self._groups(self.grouping, walk)
        if self.grouping == "node":
            return "node", groups, Cut(groups.tokens, 0.0)
        if self.chunk is not None:
            return self.grouping, groups, Cut(np.minimum(groups.tokens, self.chunk), 0.0)
        return self.grouping, groups, fill(self.prices, groups.tokens, groups.rows)

    def _cheaper(self, walk: Walk) -> tuple[str, Groups, Cut]:
        """Of ``packed`` and ``sequence``, whose paths are laid out only if they win."""
        groups = self._groups("packed", walk)
        cut = fill(self.prices, groups.tokens, groups.rows, self.chunk)
        seconds = cut.seconds + self.prices.merge_seconds(groups.row_begin, groups.row_end)
        tokens, rows = walk.paths()
        # Reading alone mostly settles it, and sums faster than the whole price.
        if self.prices.read_seconds(tokens) < seconds:
            of_paths = fill(self.prices, tokens, rows, self.chunk)
            if of_paths.seconds < seconds:
                return "sequence", self._groups("sequence", walk), of_paths
        return "packed", groups, cut

    def _groups(self, grouping: str, walk: Walk) -> Groups:
        """The groups of one grouping, with no token that none of their rows sees."""
        if grouping == "packed":
            groups = self._cut_rows(walk, packed(walk, self.prices))
        else:
            groups = UNPRICED[grouping](walk)
        return cut_window(walk, groups)

    def _cut_rows(self, walk: Walk, groups: Groups) -> Groups:
        """Groups that a tile class holds; where prices count, in blocks that it fills well."""
        most = self.prices.most_rows
        return cut_rows(walk, groups, most, most if self.deterministic else self.prices.row_step)

    def _assign(self, groups: Groups) -> tuple[Ints, Floats]:
        """The tile class of each item, and the key by which its class is ordered."""
        if self.deterministic:
            return self.prices.smallest_tile(groups.rows), groups.tokens * 1.0
        return self.prices.choose_tile(groups.tokens, groups.rows)


UNPRICED = {
    "node": by_node,
    "node_chunk": by_node,
    "flatten": flattened,
    "sequence": by_sequence,
}


def _reused(previous: Plan | None, groups: Groups) -> Partials | None:
    """The numbering of `previous`, if its items had the same rows in the same order."""
    if previous is None or len(previous.groups) != len(groups):
        return None
    old = previous.groups
    same = np.array_equal(old.row_begin, groups.row_begin)
    same = same and np.array_equal(old.row_end, groups.row_end)
    return Partials(previous.dests, previous.merge_rows, previous.merge_indptr) if same else None


def _check(grouping: str, chunk: int | None, deterministic: bool) -> None:
    if grouping not in GROUPINGS:
        raise PlanError(f"grouping is {grouping!r}; expected one of {', '.join(GROUPINGS)}")
    if chunk is not None and chunk < 1:
        raise PlanError(f"chunk is {chunk}; expected 1 or more tokens, or None")
    if chunk is not None and grouping == "node":
        raise PlanError(f"chunk is {chunk}, but 'node' never cuts; expected 'node_chunk' or None")
    if deterministic and grouping in ("flatten", "packed"):
        raise PlanError(
            f"deterministic is set and grouping is {grouping!r}, whose items depend on other "
            f"trees or on prices; expected 'auto', 'node', 'node_chunk' or 'sequence'"
        )
