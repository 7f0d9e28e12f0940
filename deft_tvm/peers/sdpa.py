"""``scaled_dot_product_attention``, sequence by sequence or over a masked tree.

SDPA knows no trees. What it needs is gathered beforehand and not counted: a copy of its path for
every row, or all tokens of a tree back to back; masks are additive and of q's type; no call moves
its output to another place.
"""

from __future__ import annotations

from functools import partial as bind

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.peer import Call, Peer, no_cap_and_no_sinks, too_large
from deft_tvm.peers.pieces import batches, by_tree


def by_sequence(gathered: Gathered, *, fold: bool = False, batch: bool = False) -> Call:
    """A call for each row, or with `batch` for all rows with paths of one length.

    With `fold` the query heads of a group are rows over their KV head, which is read once.
    """
    calls = [call for s in gathered.sequences for call in s.calls(fold=fold, batch=batch)]
    scale = gathered.case.spec.scale
    return lambda: [
        F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=not fold)
        for q, k, v in calls
    ]


def masked(gathered: Gathered) -> Call:
    """A call over all tokens of a tree, or of all neighbouring trees of one shape.

    The group is folded into rows, with a mask as many times larger: that is faster than
    ``enable_gqa`` wherever it was measured.
    """
    spec, q = gathered.case.spec, gathered.folded
    calls = []
    for batch in batches(gathered, by_tree(gathered)):
        bias = batch.bias(spec.group, q.dtype)
        here = None if bias is None else bias.to(q.device)
        calls.append((batch.lanes(q, spec.group), *gathered.read(batch.tokens), here))
    return lambda: [
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=spec.scale)
        for q, k, v, bias in calls
    ]


def _sequences_ordered(gathered: Gathered, parts: list[Tensor]) -> Tensor:
    return gathered.in_order([part.flatten(1, 2) for part in parts])


def _masked_ordered(gathered: Gathered, parts: list[Tensor]) -> Tensor:
    out, group = torch.zeros_like(gathered.folded), gathered.case.spec.group
    for batch, part in zip(batches(gathered, by_tree(gathered)), parts, strict=True):
        batch.lanes(out, group).copy_(part)
    return gathered.unfolded(out)


def _sequences_lack(gathered: Gathered) -> str | None:
    return no_cap_and_no_sinks(gathered) or too_large("copies of KV take", gathered.sequence_bytes)


def _masked_lacks(gathered: Gathered) -> str | None:
    return no_cap_and_no_sinks(gathered) or too_large("mask takes", gathered.mask_bytes)


SDPA = {
    "sequences": Peer(
        by_sequence,
        "SDPA, one call for each sequence, enable_gqa",
        _sequences_lack,
        _sequences_ordered,
    ),
    "folded": Peer(
        bind(by_sequence, fold=True),
        "SDPA, one call for each sequence, group folded into rows",
        _sequences_lack,
        _sequences_ordered,
    ),
    "batched": Peer(
        bind(by_sequence, fold=True, batch=True),
        "SDPA, one call for sequences of one length, group folded into rows",
        _sequences_lack,
        _sequences_ordered,
    ),
    "masked": Peer(
        masked,
        "SDPA, one masked call for each tree, group folded into rows",
        _masked_lacks,
        _masked_ordered,
    ),
}
