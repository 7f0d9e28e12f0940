"""Depth-first numbers of the nodes of a forest of any shape, in a few array steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import Int32, read_only
from deft_tvm.errors import TreeError


def check_parents(parents: Int32) -> None:
    outside = np.flatnonzero((parents < -1) | (parents >= len(parents)))
    if outside.size:
        n = outside[0]
        raise TreeError(
            f"parents[{n}] is {parents[n]}; expected -1 for a root, or a node from 0 to "
            f"{len(parents) - 1}"
        )


def number_preorder(parents: Int32) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Preorder number and end of the subtree of each node.

    An Euler tour enters and leaves every node; how many nodes it still has to enter after each
    step is found by list ranking with pointer doubling (Wyllie 1979): a logarithmic number of
    array steps for any shape, where a recursion or a loop over levels fails on long chains.
    """
    n = len(parents)
    following = _euler_successors(parents)
    entered_later = (np.arange(2 * n + 2) < n).astype(np.intp)
    for _ in range((2 * n + 1).bit_length()):
        entered_later += entered_later[following]
        following = following[following]
    lost = np.flatnonzero(following[:n] != 2 * n + 1)
    if lost.size:
        raise TreeError(
            f"parents has a cycle through node {_node_on_cycle(parents, int(lost[0]))}; "
            "expected every node to lead up to a root"
        )
    return n - entered_later[:n], n - entered_later[n + 1 : 2 * n + 1]


def _euler_successors(parents: Int32) -> NDArray[np.intp]:
    """The step after each step of the tour: k enters node k, n + 1 + k leaves it.

    Node n stands above all roots; leaving it is the end, which follows itself.
    """
    n = len(parents)
    above = np.where(parents < 0, n, parents).astype(np.intp)
    by_parent = np.argsort(above, kind="stable")
    above = above[by_parent]
    same = above[1:] == above[:-1]
    first = np.concatenate([[True], ~same])[:n]
    following = np.concatenate([np.arange(n + 1, 2 * n + 2), np.full(n + 1, 2 * n + 1)])
    following[above[first]] = by_parent[first]
    after = above + n + 1
    after[:-1][same] = by_parent[1:][same]
    following[n + 1 + by_parent] = after
    return following


def _node_on_cycle(parents: Int32, node: int) -> int:
    for _ in range(len(parents)):
        node = int(parents[node])
    return node


def sums_above(values: Int32, preorder: Int32, position: Int32, subtree_end: Int32) -> Int32:
    """Sum of `values` over the proper ancestors of each node.

    In preorder these are the nodes before it, without those whose subtrees have ended.
    """
    before = np.cumsum(values[preorder]) - values[preorder]
    ended = np.bincount(subtree_end, weights=values, minlength=len(values))
    ended = np.cumsum(ended)[: len(values)].astype(np.int64)
    return read_only((before - ended)[position])
