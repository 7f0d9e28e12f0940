"""What one block of a GPU may use."""

from __future__ import annotations

from deft_tvm.kernels.numerics import storage
from deft_tvm.schedules.rule import KernelTask

# Shared memory that a block may ask for, in bytes (CUDA C++ programming guide, technical
# specifications per compute capability).
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90a": 227 * 1024,
    "sm_100a": 227 * 1024,
    "sm_120a": 99 * 1024,
}
LEAST_SHARED_BYTES = 48 * 1024

BLOCKS = "deft_tvm.blocks"
"""Annotation of a loop: for how many blocks a multiprocessor shall have registers."""
MOST_THREADS = 2048
REGISTERS = 65536

ELEMENT_BYTES = {"float32": 4, "float16": 2, "uint16": 2}
TABLES_BYTES = 16384
"""More than the tables of tokens and rows ever take beside the tiles."""


def shared_limit(arch: str) -> int:
    return SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)


def fits_staged(task: KernelTask, stages: int, padding: int) -> bool:
    """Whether the tiles of a partial kernel, K and V `stages` times, fit in shared memory.

    Args:
        task: a partial kernel.
        stages: tiles of K, V and rope that are held at once.
        padding: bytes after each row of a tile.
    """
    return partial_bytes(task, stages, padding) <= shared_limit(str(task.target["arch"]))


def partial_bytes(task: KernelTask, stages: int, padding: int) -> int:
    """Shared memory that the tiles of a partial kernel take, at most; arguments as above."""
    tile, spec = task.tile, task.spec
    assert tile is not None
    element = ELEMENT_BYTES[storage(tile.operand)]
    k_width = 0 if spec.tied else spec.k_width
    widths = [width for width in (k_width, spec.v_width, spec.rope_width) if width]
    token = sum(width * element + padding for width in widths)
    row = spec.q_width * element + 2 * padding + tile.kv_tile * element
    return tile.lane_rows * row + stages * tile.kv_tile * token + TABLES_BYTES


def most_blocks(task: KernelTask, warps: int, stages: int, padding: int) -> int:
    """How many blocks of a partial kernel a multiprocessor holds at most, registers aside."""
    memory = shared_limit(str(task.target["arch"])) // partial_bytes(task, stages, padding)
    return max(1, min(memory, MOST_THREADS // (32 * warps)))
