"""``flex_attention``, compiled by TorchInductor, with the tree as its block mask."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.peer import Call, Peer, no_cap_and_no_sinks, too_large

LANES = (4, 8, 16, 32)
TOKENS = 256
"""Lane rows and tokens of a block of the mask, and of the tile of the compiled kernel. More of
either, up to 128 and 1024, was never faster by more than about a tenth (AMD EPYC Zen 4,
2026-11-21)."""
GPU_BLOCK = 128
"""Of both on a GPU, whose kernels take multiples of it."""


def flex(gathered: Gathered) -> Call:
    """One call over all tokens; blocks that no row sees are not read, full ones not masked.

    Mask and kernel are made here and not counted. Rows are in depth-first order, which leaves the
    fewest blocks. The mask is looked up in a table, as fast as comparing with intervals; the group
    is folded into rows, as ``enable_gqa`` is up to 1.5 times slower.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    spec, q = gathered.case.spec, gathered.folded.unsqueeze(0)
    k, v = gathered.k.unsqueeze(0), gathered.v.unsqueeze(0)
    table = gathered.seen.repeat_interleave(spec.group, 0).to(q.device)
    lanes, tokens = table.shape

    def seen(_batch: Tensor, _head: Tensor, lane: Tensor, token: Tensor) -> Tensor:
        return table[lane, token]

    device, on_cpu = q.device.type, q.device.type == "cpu"
    masks = {
        size: create_block_mask(
            seen, None, None, lanes, tokens, device, (size, TOKENS if on_cpu else GPU_BLOCK)
        )
        for size in (LANES if on_cpu else (GPU_BLOCK,))
    }
    blocks = masks[min(masks, key=lambda size: _cost(masks[size].to_dense(), size))]
    # One compilation for each shape: after some of them Dynamo would go on without compiling.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        return compiled(q, k, v, block_mask=blocks, scale=spec.scale)

    call()
    return call


def _cost(read: Tensor, size: int) -> int:
    """Of blocks with `size` lane rows, of which `read` are not 0: short ones use a CPU badly."""
    return int(read.count_nonzero()) * (size + 8)


def _lacks(gathered: Gathered) -> str | None:
    if gathered.q.device.type == "cpu" and shutil.which("g++") is None:
        return "there is no g++ to compile it with"
    if gathered.mask.numel() == 0:
        return "it takes no empty mask"
    size = gathered.mask.numel() * gathered.case.spec.group
    return no_cap_and_no_sinks(gathered) or too_large("mask takes", size)


def _ordered(gathered: Gathered, out: Tensor) -> Tensor:
    return gathered.unfolded(out[0])


FLEX = {
    "flex": Peer(
        flex,
        "flex_attention, compiled, group folded into rows, size of blocks by tree",
        _lacks,
        _ordered,
    )
}
