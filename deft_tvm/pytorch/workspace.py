"""Room for partials between the two stages, kept from call to call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from deft_tvm.errors import PlanError

Pair = tuple[Tensor, Tensor]
MOST_ELEMENTS = 2**31 - 1
"""Of partial outputs: stage 2 counts them in 32 bits."""


class _Kept(threading.local):
    """By heads and width; each thread its own, since two may run at once."""

    def __init__(self) -> None:
        self.by_shape: dict[tuple[int, int], tuple[int, Pair]] = {}


_kept = _Kept()


def workspace(beside: Tensor, slots: int, heads: int, width: int) -> Pair:
    """Partial outputs ``[W, heads, width]`` and LSE ``[W, heads]``, float32, with ``W >= slots``,
    on the device of a tensor.

    On a CPU fresh pages would be faulted in at every call, so a thread keeps the largest workspace
    that it has needed. On a GPU torch's allocator keeps them, by stream and for graphs.

    Raises:
        PlanError: they are more than kernels can count.
    """
    if not beside.is_cpu:
        return _allocate(beside.device, slots, heads, width)
    room, pair = _kept.by_shape.get((heads, width), (0, None))
    if pair is None or room < slots:
        # Powers of two: partials that grow with every token are not moved with every token. But
        # no more than there may be, so that what fits the room is never too much.
        room = max(slots, min(1 << (slots - 1).bit_length(), MOST_ELEMENTS // (heads * width)))
        pair = _allocate(beside.device, room, heads, width)
        _kept.by_shape[heads, width] = (room, pair)
    return pair


def _allocate(device: torch.device, slots: int, heads: int, width: int) -> Pair:
    if slots * heads * width > MOST_ELEMENTS:
        raise PlanError(
            f"the plan has {slots} partials of {heads} heads and {width} columns; expected at most "
            f"{MOST_ELEMENTS} elements: plan fewer rows or trees at a time"
        )
    out = torch.empty(slots, heads, width, dtype=torch.float32, device=device)
    return out, torch.empty(slots, heads, dtype=torch.float32, device=device)
