"""TVM's own tree attention for CPUs, ``tree_attn_cpu`` of ``tvm.relax.frontend.nn.llm.tree_attn``.

It is compiled for this machine with the target that our kernels have; it runs on one thread, row
by row. Its sibling over a paged cache, ``tree_attn_with_paged_kv_cache_cpu``, is no peer: it reads
``scale_O[d_idx]`` of a buffer of one element. A token is seen by all rows of its tree, or by those
whose numbers lie in the token's interval, where a row's number is the begin of the interval of one
of the last tokens, one for each row: its own newest.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deft_tvm.device import DeviceProfile
from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.peer import Call, Peer, no_cap_and_no_sinks, on_cpus_alone
from deft_tvm.peers.pieces import tree_rows
from deft_tvm.tree import Forest

MOST_SECONDS = 2.0
"""A call that would take longer is not worth waiting for."""

FLOP_PER_SECOND = 3e9
"""On one core of an AMD EPYC Zen 4 (2026-11-21), where it reached 2.3 to 4.8 GFLOP/s."""


@dataclass(frozen=True)
class Laid:
    """A tree's tokens as the kernel wants them; n tokens, of which the last are the rows' own.

    Attributes:
        rows: of the tree.
        tokens: int64[n] in the order of `Gathered.k`; -1 for an own token of a row without any.
        order: int32[those not seen by all, 2], the intervals of the last tokens.
    """

    rows: int
    tokens: Tensor
    order: Tensor


def tvm_tree(gathered: Gathered) -> Call:
    """One call over all trees; the order of tokens is free, and made beforehand."""
    spec, trees = gathered.case.spec, list(_laid_out(gathered))
    dtype = str(gathered.q.dtype).removeprefix("torch.")
    kernel = _compiled(spec.num_kv_heads, spec.num_q_heads, gathered.q.shape[2], dtype)
    q = gathered.depth_first(gathered.q)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    tokens = torch.cat([tree.tokens for tree in trees])
    arguments = (
        q,
        _indptr([tree.rows for tree in trees]),
        _by_token(gathered.k, tokens),
        _by_token(gathered.v, tokens),
        _indptr([len(tree.tokens) for tree in trees]),
        torch.zeros(len(q), dtype=torch.int32),  # positions for RoPE, which is off
        _indptr([len(tree.order) for tree in trees]),
        torch.cat([tree.order for tree in trees]),
        out,
        lse,
        *(0, 1.0, 1e4, spec.scale),  # no RoPE, its scale and base
    )

    def call() -> Tensor:
        kernel(*arguments)
        return out

    return call


def _laid_out(gathered: Gathered) -> Iterator[Laid]:
    own = _own_tokens(gathered.case.forest)
    for begin, end in tree_rows(gathered.case.forest):
        seen, newest = gathered.seen[begin:end], own[begin:end]
        others = seen.any(0)
        others[newest[newest >= 0]] = False
        shared = others & seen.all(0)
        masked = (others & ~shared).nonzero().squeeze(1)
        order = torch.cat([_intervals(seen, masked), _intervals(seen, newest)])
        tokens = torch.cat([shared.nonzero().squeeze(1), masked, newest])
        yield Laid(end - begin, tokens, order)


def _own_tokens(forest: Forest) -> Tensor:
    """int64[rows], the newest token of each row in depth-first order; -1 in an empty node."""
    node = forest.preorder.repeat(forest.rows[forest.preorder])
    later = forest.rows.cumsum()[node] - forest.row_order
    token = np.where(forest.lengths[node] > 0, forest.lengths.cumsum()[node] - later, -1)
    return torch.from_numpy(token).long()


def _intervals(seen: Tensor, tokens: Tensor) -> Tensor:
    """int32[n, 2], first and one past the last row that sees each token; row i and i for a -1 in
    place i, so that the token which is not there numbers its row, and is seen by none."""
    sees = seen[:, tokens].to(torch.int8)
    found = torch.stack([sees.argmax(0), len(seen) - sees.flip(0).argmax(0)], 1)
    place = torch.arange(len(tokens)).unsqueeze(1)
    return torch.where(tokens.unsqueeze(1) < 0, place, found).int()


def _by_token(x: Tensor, tokens: Tensor) -> Tensor:
    """[n, KV heads, width], zeros for a token -1."""
    found = x[:, tokens.clamp(min=0)].transpose(0, 1).contiguous()
    return found.masked_fill_((tokens < 0)[:, None, None], 0)


def _indptr(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


@lru_cache(maxsize=4)
def _compiled(kv_heads: int, q_heads: int, width: int, dtype: str) -> Any:
    """The kernel, a function of tensors."""
    import tvm

    module = importlib.import_module("tvm.relax.frontend.nn.llm.tree_attn")
    written = module.tree_attn_cpu(kv_heads, q_heads, width, dtype, {})
    named = tvm.IRModule({"tree_attn": written.with_attr("global_symbol", "tree_attn")})
    target = tvm.target.Target(dict(DeviceProfile.detect().target()))
    return tvm.compile(named, target=target)["tree_attn"]


def _lacks(gathered: Gathered) -> str | None:
    if elsewhere := on_cpus_alone(gathered):
        return elsewhere
    if gathered.case.spec.window is not None:
        return "it has no window"
    if not gathered.seen.any(1).all():
        return "a row sees nothing, which it does not know"
    if find_spec("tvm") is None:
        return "it needs TVM (pip install '.[tune]')"
    seconds = _flop(gathered) / FLOP_PER_SECOND
    if seconds > MOST_SECONDS:
        return f"one call would take about {seconds:.0f} s"
    return no_cap_and_no_sinks(gathered)


def _flop(gathered: Gathered) -> int:
    """Of both products of every row with all tokens of its tree, masked ones too."""
    pairs = sum(
        (end - begin) * int(gathered.seen[begin:end].any(0).sum())
        for begin, end in tree_rows(gathered.case.forest)
    )
    return 4 * pairs * gathered.case.spec.num_q_heads * gathered.q.shape[2]


def _ordered(gathered: Gathered, out: Tensor) -> Tensor:
    return gathered.callers(out[..., : gathered.case.spec.v_width])


TVM = {
    "tvm": Peer(
        tvm_tree,
        "TVM's tree_attn_cpu, compiled for this machine, one thread",
        _lacks,
        _ordered,
    )
}
