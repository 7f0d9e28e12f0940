"""Cut long groups so that every core is busy until the end, and no finer than that pays.

Tile classes are kernels of their own and run one after another, so that each has an end at which
cores may wait.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deft_tvm.plan.cost import Floats, Ints, Prices, by_class, running_sum

SLACK = 1.02
"""A plan within this factor of a perfect balance is not cut (chosen, not measured)."""

SHARES = np.array([0.5, 0.75, 0.9, 1.0, 2.0, 3.0, 4.0, 8.0])
"""Longest units tried, as parts of their class's perfect balance. Those below 1 leave some cores
idle in the last wave but save the wave after it (chosen, not measured)."""


class Cut(NamedTuple):
    """How groups are to be cut.

    Attributes:
        chunk: int[G], tokens at which to cut each group.
        seconds: of what is so cut.
        tiles: the tile class of each group and the seconds of its units, where none is cut.
    """

    chunk: Ints
    seconds: float
    tiles: tuple[Ints, Floats] | None = None


def fill(prices: Prices, tokens: Ints, rows: Ints, chunk: int | None = None) -> Cut:
    """Where to cut each group, and what that costs.

    Cuts are even and whole multiples of `Prices.cut_steps`. Each adds a partial for each row, which
    is counted; a plan that the uncut groups balance stays whole but for what
    `Prices.longest` says.

    Args:
        prices: the device.
        tokens: int[G], tokens of each group.
        rows: int[G], rows of each group.
        chunk: cut here instead, and only tell the price.
    """
    if not len(tokens):
        return Cut(tokens, 0.0)
    if chunk is not None:
        given = np.minimum(tokens, chunk)
        return Cut(given, float(_seconds(prices, tokens, given[None], rows)[0]))
    tile, seconds, units = prices.units_of(tokens, rows)
    steps = prices.cut_steps[tile]
    balanced = np.bincount(tile, seconds * units) / prices.cores
    waits = 2 * tokens * prices.token_seconds > seconds * units
    fewest: Ints | int = 1
    if (waits & (tokens > prices.longest)).any():
        fewest = np.where(waits, -(-tokens // prices.longest), 1)
        uncut = _evenly(steps, tokens, fewest)
        whole = Cut(uncut, float(_seconds(prices, tokens, uncut[None], rows)[0]))
    else:
        whole = Cut(tokens, float(by_class(tile, seconds, units, prices.cores)), (tile, seconds))
    if whole.seconds <= SLACK * running_sum(balanced):
        return whole
    pieces = np.ceil(seconds / (balanced[tile] / SHARES[:, None])).astype(np.int64)
    tried = _evenly(steps, tokens, np.maximum(pieces, fewest))
    cost = _seconds(prices, tokens, tried, rows)
    best = int(cost.argmin())
    return Cut(tried[best], float(cost[best])) if cost[best] < whole.seconds else whole


def _evenly(step: Ints, tokens: Ints, pieces: Ints | int) -> Ints:
    """int[…, G], tokens of a piece, in steps of so many."""
    return np.minimum(-(-tokens // (pieces * step)) * step, tokens)


def _seconds(prices: Prices, tokens: Ints, chunk: Ints, rows: Ints) -> Floats:
    """float[S] for int[S, G] chunks: the makespan, and the partials that cutting adds."""
    pieces, rows = -(-tokens // chunk), np.broadcast_to(rows, chunk.shape)
    tile, seconds, units = prices.units_of(chunk.ravel(), rows.ravel())
    units = units.reshape(chunk.shape) * pieces
    seconds = seconds.reshape(chunk.shape)
    time = by_class(tile.reshape(chunk.shape), seconds, units, prices.cores)
    return time + prices.partial_seconds * ((pieces - 1) * rows).sum(axis=1)
