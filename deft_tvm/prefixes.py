"""The prefixes that sequences share, found from the sequences alone as a radix tree finds them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deft_tvm.arrays import Int32, int32_array
from deft_tvm.errors import TreeError

_EMPTY = np.zeros(0, np.int32)


def padded(name: str, lists: Any) -> tuple[Int32, NDArray[np.int32]]:
    """The lists as rows of one matrix, and the length of each."""
    if hasattr(lists, "__array__"):
        table = np.asarray(lists)
        if table.ndim != 2:
            raise TreeError(f"{name} has shape {table.shape}; expected two dimensions")
        flat = int32_array(name, table.ravel(), None, TreeError)
        return flat.reshape(table.shape), np.full(len(table), table.shape[1], np.int32)
    rows = [int32_array(f"{name}[{i}]", one, None, TreeError) for i, one in enumerate(lists)]
    counts = np.array([len(row) for row in rows], np.int32)
    matrix = np.zeros((len(rows), counts.max(initial=0)), np.int32)
    matrix[np.arange(matrix.shape[1]) < counts[:, None]] = np.concatenate([_EMPTY, *rows])
    return matrix, counts


def shared_prefixes(
    name: str, table: Int32, lengths: Int32, unit: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Parents, lengths and rows of the nodes of sequences with `unit` tokens per table entry.

    Forks come first, the shorter before the longer, then a node with one row for each sequence.
    The last array is the number of a sequence through each node.
    """
    order, shared = _shared_lengths(_sort_keys(name, table, lengths, unit), lengths, unit)
    parents, ends, through = _prefix_tree(lengths[order].tolist(), shared.tolist())
    forks = len(order) + np.argsort(ends[len(order) :], kind="stable")
    old = np.concatenate([forks, np.argsort(order)])
    new = np.argsort(old)
    above = parents[old]
    starts = np.where(above < 0, 0, ends[above])
    return (
        np.where(above < 0, -1, new[above]),
        ends[old] - starts,
        (old < len(order)).astype(np.int32),
        order[through[old]],
    )


def _sort_keys(name: str, table: Int32, lengths: Int32, unit: int) -> NDArray[np.uint32]:
    """Big-endian words whose bytes sort a prefix before what it begins, blocks before length."""
    inside = np.arange(table.shape[1]) < -(-lengths[:, None] // unit)
    negative = np.argwhere(inside & (table < 0))
    if len(negative):
        s, k = negative[0]
        raise TreeError(f"{name}[{s}][{k}] is {table[s, k]}; expected 0 or more")
    return np.column_stack([np.where(inside, table + 1, 0), lengths]).astype(">u4")


def _shared_lengths(
    keys: NDArray[np.uint32], lengths: Int32, unit: int
) -> tuple[NDArray[np.intp], NDArray[Any]]:
    """The sequences in sorted order, and the tokens that each shares with the one before it."""
    order = np.argsort(keys.view(f"V{4 * keys.shape[1]}").ravel(), kind="stable")
    differs = keys[order[1:]] != keys[order[:-1]]
    differs[:, -1:] = True  # so that equal sequences differ after their last block
    sizes = lengths[order]
    shared = np.minimum(differs.argmax(axis=1) * unit, np.minimum(sizes[1:], sizes[:-1]))
    return order, np.concatenate([np.zeros(min(len(order), 1), np.intp), shared])


def _prefix_tree(
    lengths: list[int], shared: list[int]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Compressed trie of sorted sequences from the prefixes that neighbours share.

    The construction of a suffix tree from its LCP array (Kasai et al. 2001): `path`
    leads to the sequence before, and the next one leaves it where the shared prefix ends. Node i
    ends sequence i; forks are numbered after them.

    Returns:
        Parent, end (tokens from the root) and one sequence through it, for each node.
    """
    parents, ends, through = [-1] * len(lengths), list(lengths), list(range(len(lengths)))
    path, below = [(-1, 0)], -1
    for node, (length, common) in enumerate(zip(lengths, shared, strict=True)):
        while path[-1][1] > common:
            below, _ = path.pop()
        if path[-1][1] < common:
            fork = len(parents)
            parents[below] = fork
            parents.append(path[-1][0])
            ends.append(common)
            through.append(node)
            path.append((fork, common))
        parents[node] = path[-1][0]
        path.append((node, length))
    return np.array(parents, np.intp), np.array(ends, np.intp), np.array(through, np.intp)
