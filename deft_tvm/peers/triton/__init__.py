"""Published tree attention as Triton kernels of our own, each at its best setting.

Both read KV in place from its pages, once for all query heads of a KV head's group, with products
on tensor cores; plans, buffers and the search for tiles are made beforehand and not counted.
Importing this needs no triton.
"""

from __future__ import annotations

from deft_tvm.peers.peer import Peer
from deft_tvm.peers.triton.peers import deft_flatten, fast_tree, lacks, ordered

TRITON = {
    "deft_flatten": Peer(
        deft_flatten,
        "DeFT-Flatten in Triton, group folded into rows, chunk and tile searched",
        lacks,
        ordered,
    ),
    "fasttree": Peer(
        fast_tree,
        "FastTree in Triton, its rules, group folded into rows, split and tiles searched",
        lacks,
        ordered,
    ),
}
"""They run on CUDA, or in Triton's interpreter."""

__all__ = ["TRITON"]
