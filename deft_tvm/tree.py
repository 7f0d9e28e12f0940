"""The batch as a forest of token trees, numbered so that every mask is an interval.

A node is a run of KV tokens that all nodes below it share; a row is one query token. Number the
rows in depth-first preorder: those that see a KV token are then neighbours. ::

    0 (6 tokens) ─┬─ 1 (3) ─┬─ 3 (4)
                  │         └─ 4 (1)
                  └─ 2 (2) ─┬─ 5 (1)
                            └─ 6 (2)

>>> forest = Forest.from_parents(
...     parents=[-1, 0, 0, 1, 1, 2, 2], lengths=[6, 3, 2, 4, 1, 1, 2], rows=[0, 0, 1, 1, 1, 1, 2]
... )
>>> forest
Forest(nodes=7, trees=1, levels=3, tokens=19, rows=6)
>>> forest.preorder.tolist()
[0, 1, 3, 4, 2, 5, 6]
>>> list(zip(forest.row_begin.tolist(), forest.row_end.tolist()))
[(0, 6), (0, 2), (2, 6), (0, 1), (1, 2), (3, 4), (4, 6)]
>>> forest.row_order.tolist()  # the caller's first row is that of node 2, the third in preorder
[1, 2, 0, 3, 4, 5]

TVM's paged KV cache masks the rows of a draft by preorder intervals; here a whole forest is masked
so, by one interval for each run of KV tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deft_tvm.arrays import Int32, check_counts, consecutive, int32_array, read_only
from deft_tvm.errors import TreeError
from deft_tvm.prefixes import padded, shared_prefixes
from deft_tvm.preorder import check_parents, number_preorder, sums_above


@dataclass(frozen=True, eq=False, repr=False)
class Forest:
    """One or more token trees: who descends from whom, how many tokens, which rows see what.

    Made by the builders below, never by its own constructor. All arrays are int32 and read-only,
    and have one entry for each node in the caller's order unless they say otherwise. Rows are
    numbered by the caller node by node, and by position within a node: its r rows are its last r
    tokens. Token ``p`` of node ``n`` is seen by exactly the preorder rows
    ``[row_begin[n] + max(0, p - diagonal[n]), row_end[n])``.

    Attributes:
        parents: number of the parent, -1 for a root.
        lengths: KV tokens of the node itself; 0 is allowed.
        rows: query rows of the node itself, at most its length. A node of length 0 may have any
            number: they see the whole path, and not each other.
        bidirectional: 1 for a node whose rows see it whole, later tokens too, as blocks of
            diffusion decoders do; 0 for one that is causal inside.
        preorder: the nodes in depth-first order, children in the caller's order.
        position: place of the node in `preorder`.
        subtree_end: the subtree is ``preorder[position:subtree_end]``.
        row_begin: first preorder row of the subtree; the node's own rows come first.
        row_end: one past the last preorder row of the subtree.
        row_order: int32[num_rows], the caller's number of each preorder row.
        start: tokens on the path above the node, so the path position of its first token.
        diagonal: tokens that all of the subtree's rows see; the later ones are cut causally.
        is_part: `deft_tvm.context.context_part` made it: tokens are elsewhere too, so that no
            position is known, and no window can be planned.
    """

    parents: Int32
    lengths: Int32
    rows: Int32
    bidirectional: Int32
    preorder: Int32
    position: Int32
    subtree_end: Int32
    row_begin: Int32
    row_end: Int32
    row_order: Int32
    start: Int32
    diagonal: Int32
    is_part: bool = False

    @property
    def num_nodes(self) -> int:
        return len(self.parents)

    @property
    def num_rows(self) -> int:
        return len(self.row_order)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def row_positions(self) -> Int32:
        """int32[num_rows], position on its path of each preorder row, the path's last token's for
        the rows of a node of length 0."""
        node, within = np.repeat(self.preorder, self.rows[self.preorder]), self.row_order
        before = np.cumsum(self.rows) - self.rows
        first = self.start + np.where(self.lengths > 0, self.lengths - self.rows, -1)
        step = np.where(self.lengths[node] > 0, within - before[node], 0)
        return read_only(first[node] + step)

    @property
    def level(self) -> Int32:
        """Number of ancestors of each node."""
        return sums_above(
            np.ones_like(self.lengths), self.preorder, self.position, self.subtree_end
        )

    def __repr__(self) -> str:
        trees, levels = int((self.parents < 0).sum()), int(self.level.max(initial=-1)) + 1
        return (
            f"Forest(nodes={self.num_nodes}, trees={trees}, levels={levels}, "
            f"tokens={self.num_tokens}, rows={self.num_rows})"
        )

    def with_lengths(self, lengths: ArrayLike) -> Forest:
        """The same nodes and rows with other KV lengths; all that depends on topology is shared.

        Raises:
            TreeError: `lengths` is not one integer per node, negative, or less than a node's rows.
        """
        checked = int32_array("lengths", lengths, self.num_nodes, TreeError)
        check_counts("lengths", checked)
        _check_rows_fit(self.rows, checked)
        start = sums_above(checked, self.preorder, self.position, self.subtree_end)
        whole = self.bidirectional > 0
        diagonal = read_only(np.where(whole, checked, np.maximum(checked - self.rows, 0)))
        return replace(self, lengths=checked, start=start, diagonal=diagonal)

    def same_topology(self, other: Forest) -> bool:
        """Whether all but the lengths agrees."""
        return self.preorder is other.preorder or all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("parents", "rows", "bidirectional")
        )

    @classmethod
    def from_parents(
        cls,
        parents: ArrayLike,
        lengths: ArrayLike,
        rows: ArrayLike | None = None,
        bidirectional: ArrayLike | None = None,
    ) -> Forest:
        """A forest from one entry per node, nodes in any order.

        Args:
            parents: int[nodes], the number of the parent or -1 for a root.
            lengths: int[nodes], KV tokens of the node.
            rows: int[nodes], query rows of the node; by default one at each leaf.
            bidirectional: bool[nodes], whose rows see their node whole; by default none.

        Raises:
            TreeError: a parent out of range, a cycle, a negative number, arrays of different
                sizes, or more rows than a node has tokens.
        """
        above = int32_array("parents", parents, None, TreeError)
        check_parents(above)
        if rows is None:
            rows = np.ones(len(above), np.int32)
            rows[above[above >= 0]] = 0
        own = int32_array("rows", rows, len(above), TreeError)
        check_counts("rows", own)
        whole = np.zeros(len(above), bool) if bidirectional is None else np.asarray(bidirectional)
        if whole.dtype != bool or whole.shape != above.shape:
            raise TreeError(
                f"bidirectional is {whole.dtype} of shape {whole.shape}; expected one bool for "
                f"each of {len(above)} nodes"
            )
        return _without_tokens(above, own, read_only(whole)).with_lengths(lengths)

    @classmethod
    def from_branches(cls, branches: Sequence[Sequence[int]]) -> tuple[Forest, Int32]:
        """A forest from whole token sequences; shared prefixes are found, as in a radix tree.

        Row b is the last token of branch b. A branch that repeats an earlier one ends in a node
        of length 0 below it. Nodes that only fork come first, shorter prefixes before longer;
        then one node per branch. The memory taken is that of branches
        times the longest branch.

        Returns:
            The forest, and int32[branches], the node in which each branch ends.

        Raises:
            TreeError: a branch is not a list of token ids from 0 on.

        >>> forest, ends = Forest.from_branches([[5, 6, 7, 1], [5, 6, 8], [5, 6, 7, 2, 3]])
        >>> forest.parents.tolist(), forest.lengths.tolist(), ends.tolist()
        ([-1, 0, 1, 0, 1], [2, 1, 1, 1, 2], [2, 3, 4])
        """
        ids, lengths = padded("branches", branches)
        parents, sizes, rows, _ = shared_prefixes("branches", ids, lengths, unit=1)
        forest = cls.from_parents(parents, sizes, rows)
        ends = np.arange(forest.num_nodes - len(lengths), forest.num_nodes)
        return forest, read_only(ends)

    @classmethod
    def from_choices(
        cls,
        choices: Sequence[Sequence[int]],
        context: int | Sequence[int],
        *,
        root_row: bool = True,
    ) -> Forest:
        """Draft trees of speculative decoding, each under a context that is already cached.

        For each context one node with its tokens, then one node with one token and one row for
        each choice, in the order given. With `root_row` the last token of the context, from which
        the draft was made, has a row too: the first of its tree.

        Args:
            choices: paths of child ranks, as Medusa and EAGLE list them: ``[(0,), (0, 0), (1,)]``
                are the best first token, the best one after it, and the second best first token.
            context: tokens before the draft, for one tree or for each tree of a batch.

        Raises:
            TreeError: a choice is empty, given twice, or lacks its prefix; a context is negative,
                or empty although its last token shall have a row.

        >>> forest = Forest.from_choices([(0,), (0, 0), (1,)], context=40)
        >>> forest.parents.tolist(), forest.lengths.tolist(), forest.rows.tolist()
        ([-1, 0, 1, 0], [40, 1, 1, 1], [1, 1, 1, 1])
        """
        above = _choice_parents(choices)
        contexts = int32_array("context", np.atleast_1d(context), None, TreeError)
        if root_row and (contexts < 1).any():
            raise TreeError(
                f"context is {contexts.min()}; expected 1 or more, as its last token has a row"
            )
        first = np.repeat(np.arange(len(contexts)) * len(above), len(above))
        above = np.tile(above, len(contexts))
        lengths, rows = np.ones_like(above), np.ones_like(above)
        lengths[above < 0], rows[above < 0] = contexts, root_row
        return cls.from_parents(np.where(above < 0, -1, above + first), lengths, rows)

    @classmethod
    def from_block_tables(
        cls, block_tables: ArrayLike | Sequence[Sequence[int]], seq_lens: ArrayLike, page_size: int
    ) -> tuple[Forest, Int32, Int32, Int32]:
        """The forest that a serving engine's block tables imply, and where its tokens lie.

        Sequences whose tables begin with the same blocks share those tokens. Row s is the last
        token of sequence s; nodes are numbered as in `from_branches`.

        Args:
            block_tables: int[sequences, blocks], or lists; entries past a sequence are not read.
            seq_lens: int[sequences], tokens in the cache, the current one included.
            page_size: tokens a block.

        Returns:
            The forest, then ``page_indices``, ``page_indptr`` and ``first_slot`` of `PageTable`.

        Raises:
            TreeError: a table is too short for its sequence, or names a negative block.
        """
        if page_size < 1:
            raise TreeError(f"page_size is {page_size}; expected 1 or more")
        blocks, width = padded("block_tables", block_tables)
        lengths = int32_array("seq_lens", seq_lens, len(blocks), TreeError)
        check_counts("seq_lens", lengths)
        short = np.flatnonzero(lengths > width * page_size)
        if short.size:
            s = short[0]
            raise TreeError(
                f"block_tables[{s}] holds {width[s]} blocks of {page_size} tokens; "
                f"expected room for seq_lens[{s}], which is {lengths[s]}"
            )
        parents, sizes, rows, through = shared_prefixes("block_tables", blocks, lengths, page_size)
        forest = cls.from_parents(parents, sizes, rows)
        begin = forest.start // page_size
        count = -(-(forest.start + forest.lengths) // page_size) - begin
        count[forest.lengths == 0] = 0
        pages = blocks[np.repeat(through, count), consecutive(begin, count)]
        indptr = np.concatenate([[0], np.cumsum(count)])
        slot = forest.start % page_size
        return forest, read_only(pages), read_only(indptr), read_only(slot)


def _check_rows_fit(rows: Int32, lengths: Int32) -> None:
    over = np.flatnonzero((rows > lengths) & (lengths > 0))
    if over.size:
        n = over[0]
        raise TreeError(
            f"rows[{n}] is {rows[n]}; expected at most lengths[{n}], which is {lengths[n]}"
        )


def _without_tokens(parents: Int32, rows: Int32, bidirectional: Int32) -> Forest:
    """The topology, as a forest whose nodes are all empty."""
    position, subtree_end = number_preorder(parents)
    preorder = np.empty_like(position)
    preorder[position] = np.arange(len(parents))
    before = np.concatenate([[0], np.cumsum(rows[preorder])])
    begins = (np.cumsum(rows) - rows)[preorder]
    arrays = {
        "preorder": preorder,
        "position": position,
        "subtree_end": subtree_end,
        "row_begin": before[position],
        "row_end": before[subtree_end],
        "row_order": consecutive(begins, rows[preorder]),
    }
    zeros = read_only(np.zeros_like(parents))
    shared: dict[str, Any] = {name: read_only(array) for name, array in arrays.items()}
    own: dict[str, Any] = {"rows": rows, "bidirectional": bidirectional}
    return Forest(parents, lengths=zeros, start=zeros, diagonal=zeros, **own, **shared)


def _choice_parents(choices: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """Parents of the root (entry 0) and of each choice (entry 1 on)."""
    paths = [tuple(choice) for choice in choices]
    node = {path: k for k, path in enumerate(paths, start=1)} | {(): 0}
    above = [-1]
    for k, path in enumerate(paths):
        if node[path] != k + 1:
            raise TreeError(f"choices[{k}] is {path}; expected every path once, none of them empty")
        if path[:-1] not in node:
            raise TreeError(f"choices[{k}] is {path}; expected its prefix {path[:-1]} as a choice")
        above.append(node[path[:-1]])
    return np.array(above, np.int32)
