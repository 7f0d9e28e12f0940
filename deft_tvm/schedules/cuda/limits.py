"""What one block of a GPU may use."""

from __future__ import annotations

from deft_tvm.device import shared_limit
from deft_tvm.plan.residency import unit_bytes
from deft_tvm.schedules.rule import PartialTask

BLOCKS = "deft_tvm.blocks"
"""Annotation of a loop: for how many blocks a multiprocessor shall have registers."""
MOST_THREADS = 2048


def fits_staged(task: PartialTask, stages: int, padding: int) -> bool:
    """Whether the tiles of a partial kernel, K and V `stages` times, fit in shared memory.

    Args:
        task: a partial kernel.
        stages: tiles of K, V and rope that are held at once.
        padding: bytes after each row of a tile.
    """
    used = unit_bytes(task.spec, task.tile, stages, padding)
    return used <= shared_limit(str(task.target["arch"]))


def most_blocks(task: PartialTask, warps: int, stages: int, padding: int) -> int:
    """How many blocks of a partial kernel a multiprocessor holds at most, registers aside."""
    used = unit_bytes(task.spec, task.tile, stages, padding)
    memory = shared_limit(str(task.target["arch"])) // used
    return max(1, min(memory, MOST_THREADS // (32 * warps)))
