"""FlashInfer (Ye et al. 2025, arXiv 2501.01005), sequence by sequence, in levels, or masked.

Planning, packing KV into pages and the depth-first order of rows are not counted: a call is what
one layer takes. Levels are read and merged as its ``MultiLevelCascadeAttentionWrapper`` does it,
with two differences: the backend can be chosen, and a row that has no tokens on a level is left out
of the merge, since kernels for MLA take no empty requests. Its first call of a kind compiles, where
its modules were not built before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from functools import partial as bind
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from deft_tvm.peers.gathered import Gathered
from deft_tvm.peers.paged import (
    PAGE,
    Cut,
    Table,
    by_node,
    by_prefix,
    by_sequence,
    by_tree,
    cache,
    paged,
)
from deft_tvm.peers.peer import Peer, no_cap_and_no_sinks
from deft_tvm.peers.pieces import tree_rows

DEVICE = "cuda"
WORKSPACE_BYTES = 512 << 20
"""For what FlashInfer keeps between the halves of a split: the 128 MiB that it recommends are too
little with 16 query heads to a KV head."""

WIDTHS = (64, 128, 256)
"""Of heads that its kernels for K and V take."""
LATENT_WIDTHS = {512: "auto", 256: "fa2"}
"""Of latents, and the backend: the descriptors of that for Hopper are written for 512 columns."""
ROPE_WIDTH = 64
CORE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads to a KV head that decoding without tensor cores is compiled for."""
MOST_REQUESTS = 32_767
MOST_TOKENS = 16 << 20
"""Of all requests of a call: as many as the buffers of a wrapper for Hopper hold."""
MOST_LATENT_REQUESTS = 8_192
"""Half the pieces of work that the plan for MLA holds."""
MOST_MASKED = (1 << 31) - 1

Caches = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Planned:
    """A planned call.

    Attributes:
        run: computes attention over two caches like `caches`, always into the same tensor.
        caches: in pages; K and V, or latents and ropes.
    """

    run: Callable[[Caches], Tensor]
    caches: Caches

    def __call__(self) -> Tensor:
        return self.run(self.caches)

    def over_a_copy(self) -> Planned:
        """The same plan over caches of its own, as another layer has them."""
        first, second = self.caches
        return replace(self, caches=(first.clone(), second.clone()))


def decode(gathered: Gathered, *, tensor_cores: bool) -> Planned:
    """``BatchDecodeWithPagedKVCacheWrapper``: one request for each row."""
    q, out = _queries(gathered)
    pages, (table,) = paged(by_sequence(gathered))
    wrapper = _library().BatchDecodeWithPagedKVCacheWrapper(
        _workspace(q.device), "NHD", use_tensor_cores=tensor_cores
    )
    wrapper.plan(
        table.page_indptr,
        table.page_indices,
        table.last_page_len,
        *_sizes(gathered),
        **_options(gathered),
    )
    return _warm(lambda kv: wrapper.run(q, kv, out=out), _keys_and_values(gathered, pages))


def cascade(gathered: Gathered, *, cut: Cut, backend: str) -> Planned:
    """``BatchPrefillWithPagedKVCacheWrapper`` on each level, merged by ``merge_state_in_place``."""
    q, out = _queries(gathered)
    pages, tables = paged(cut(gathered))
    parts = [_prefill(gathered, table, backend) for table in tables]

    def read(part: Any, kv: Caches, out: Tensor, lse: Tensor) -> None:
        part.run(q, kv, out=out, lse=lse, return_lse=True)

    run = _merged([bind(read, part) for part in parts], tables, out)
    return _warm(run, _keys_and_values(gathered, pages))


def masked(gathered: Gathered) -> Planned:
    """``BatchPrefillWithPagedKVCacheWrapper``: one request for each tree, with a custom mask."""
    q, out = _queries(gathered)
    level, mask = by_tree(gathered)
    pages, (table,) = paged([level])
    # The mask is packed where it lies, with the indices beside it.
    wrapper = _prefill(gathered, table.to(q.device), "fa2", custom_mask=mask.to(q.device))
    return _warm(lambda kv: wrapper.run(q, kv, out=out), _keys_and_values(gathered, pages))


def latent(gathered: Gathered, *, cut: Cut) -> Planned:
    """``BatchMLAPagedAttentionWrapper`` on each level; out is [heads · rows, group, v_width].

    It knows one latent head. Where there are more, as in GLA, the rows of each are rows of their
    own over pages of their own, each with a copy of the rope.
    """
    spec, q = gathered.case.spec, gathered.folded.unflatten(1, (-1, gathered.case.spec.group))
    q = q.flatten(0, 1)
    nope, rope = (x.contiguous() for x in q.split([spec.v_width, spec.rope_width], -1))
    pages, tables = paged(cut(gathered))
    keys = cache(pages, gathered.k).permute(2, 0, 1, 3).flatten(0, 1)
    caches = tuple(x.contiguous() for x in keys.split([spec.v_width, spec.rope_width], -1))
    tables = [table.for_heads(spec.num_kv_heads, len(pages)) for table in tables]
    parts = [_latent(gathered, table) for table in tables]
    out, single = torch.empty_like(nope), len(parts) == 1

    def read(part: Any, kv: Caches, out: Tensor, lse: Tensor) -> None:
        more = {} if single else {"lse": lse, "return_lse": True}
        part.run(nope, rope, *kv, out=out, **more)

    return _warm(_merged([bind(read, part) for part in parts], tables, out), caches)


def _merged(
    parts: Sequence[Callable[[Caches, Tensor, Tensor], None]], tables: Sequence[Table], out: Tensor
) -> Callable[[Caches], Tensor]:
    """All parts after another; each writes output and LSE, the first those that are returned."""
    merge = _library().merge_state_in_place
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    more, more_lse = torch.empty_like(out), torch.empty_like(lse)
    reads = [None if t.reads is None else t.reads.to(out.device) for t in tables]

    def run(caches: Caches) -> Tensor:
        parts[0](caches, out, lse)
        for part, rows in zip(parts[1:], reads[1:], strict=True):
            part(caches, more, more_lse)
            merge(out, lse, more, more_lse, rows)
        return out

    return run


def _prefill(gathered: Gathered, table: Table, backend: str, **options: Any) -> Any:
    wrapper = _library().BatchPrefillWithPagedKVCacheWrapper(
        _workspace(gathered.q.device), "NHD", backend=backend
    )
    wrapper.plan(
        table.row_indptr,
        table.page_indptr,
        table.page_indices,
        table.last_page_len,
        *_sizes(gathered),
        **_options(gathered),
        **options,
    )
    return wrapper


def _latent(gathered: Gathered, table: Table) -> Any:
    spec, dtype = gathered.case.spec, gathered.q.dtype
    wrapper = _library().BatchMLAPagedAttentionWrapper(
        _workspace(gathered.q.device), backend=LATENT_WIDTHS[spec.v_width]
    )
    wrapper.plan(
        table.row_indptr,
        table.page_indptr,
        table.page_indices,
        table.lengths,
        spec.group,
        spec.v_width,
        spec.rope_width,
        PAGE,
        False,  # causal
        spec.scale,
        dtype,
        dtype,
    )
    return wrapper


def _queries(gathered: Gathered) -> tuple[Tensor, Tensor]:
    """q in depth-first order, and room for what comes out."""
    q = gathered.depth_first(gathered.q).contiguous()
    return q, torch.empty_like(q)


def _keys_and_values(gathered: Gathered, pages: Tensor) -> Caches:
    return cache(pages, gathered.k), cache(pages, gathered.v)


def _sizes(gathered: Gathered) -> tuple[int, int, int, int]:
    spec = gathered.case.spec
    return spec.num_q_heads, spec.num_kv_heads, gathered.q.shape[2], PAGE


def _options(gathered: Gathered) -> dict[str, Any]:
    spec, dtype = gathered.case.spec, gathered.q.dtype
    return {
        "sm_scale": spec.scale,
        "logits_soft_cap": spec.soft_cap,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }


def _warm(run: Callable[[Caches], Tensor], caches: Caches) -> Planned:
    """After a first call, which loads and allocates what a captured one must find in place."""
    planned = Planned(run, caches)
    planned()
    return planned


def _library() -> Any:
    return importlib.import_module("flashinfer")


@lru_cache
def _workspace(device: torch.device) -> Tensor:
    """One for all wrappers, as calls follow one another; its first user expects zeros."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _lacks(gathered: Gathered) -> str | None:
    """What holds for all of them."""
    if find_spec("flashinfer") is None:
        return "it needs FlashInfer (pip install flashinfer-python)"
    if (place := gathered.q.device.type) != DEVICE:
        return f"it runs on {DEVICE} alone, the tensors are on {place}"
    types = {gathered.q.dtype, gathered.k.dtype, gathered.v.dtype}
    if types not in ({torch.float16}, {torch.bfloat16}):
        names = " and ".join(sorted(str(each).removeprefix("torch.") for each in types))
        return f"q, K and V are {names}; it takes float16 or bfloat16"
    if not gathered.mask.any(1).all():
        return "a row sees nothing, which it does not know"
    return None


def _heads_lack(gathered: Gathered) -> str | None:
    width = gathered.q.shape[2]
    if lacks := _lacks(gathered):
        return lacks
    if width not in WIDTHS:
        return f"heads are {width} wide; it takes {', '.join(map(str, WIDTHS))}"
    if gathered.case.spec.sinks:
        return "it has no sinks"
    if len(gathered.mask) > MOST_REQUESTS or int(gathered.mask.sum()) > MOST_TOKENS:
        return "a buffer of its wrapper is too small for all paths"
    return None


def _core_lacks(gathered: Gathered) -> str | None:
    lacks, group = _heads_lack(gathered), gathered.case.spec.group
    if lacks is None and group not in CORE_GROUPS:
        return f"{group} query heads share a KV head; it takes {', '.join(map(str, CORE_GROUPS))}"
    return lacks


def _masked_lacks(gathered: Gathered) -> str | None:
    seen = gathered.seen
    size = sum(
        (end - begin) * int(seen[begin:end].any(0).sum())
        for begin, end in tree_rows(gathered.case.forest)
    )
    if size > MOST_MASKED:
        return f"its mask has {size} entries, and it numbers {MOST_MASKED}"
    return _heads_lack(gathered)


def _latent_lacks(gathered: Gathered) -> str | None:
    spec = gathered.case.spec
    if lacks := no_cap_and_no_sinks(gathered) or _lacks(gathered):
        return lacks
    if spec.v != spec.k or spec.rope_width != ROPE_WIDTH or spec.v_width not in LATENT_WIDTHS:
        return (
            f"it takes a latent of {' or '.join(map(str, LATENT_WIDTHS))} columns that is K and V, "
            f"and a rope of {ROPE_WIDTH}"
        )
    if len(gathered.mask) * spec.num_kv_heads > MOST_LATENT_REQUESTS:
        return "its plan is too small for all rows"
    return None


def _ordered(gathered: Gathered, out: Tensor) -> Tensor:
    return gathered.callers(out[..., : gathered.case.spec.v_width])


def _latent_ordered(gathered: Gathered, out: Tensor) -> Tensor:
    heads = out.unflatten(0, (gathered.case.spec.num_kv_heads, -1))
    return gathered.callers(heads.transpose(0, 1).flatten(1, 2))


FLASHINFER = {
    "flashinfer_decode": Peer(
        bind(decode, tensor_cores=True),
        "FlashInfer's decoding on tensor cores, one request for each row, prefixes share pages",
        _heads_lack,
        _ordered,
    ),
    "flashinfer_decode_cores": Peer(
        bind(decode, tensor_cores=False),
        "FlashInfer's decoding without tensor cores, one request for each row",
        _core_lacks,
        _ordered,
    ),
    "flashinfer_levels": Peer(
        bind(cascade, cut=by_node, backend="fa2"),
        "FlashInfer's cascade, a level for each depth, its backend FA2",
        _heads_lack,
        _ordered,
    ),
    "flashinfer_levels_auto": Peer(
        bind(cascade, cut=by_node, backend="auto"),
        "FlashInfer's cascade, a level for each depth, the backend that it takes: FA3 on Hopper",
        _heads_lack,
        _ordered,
    ),
    "flashinfer_prefix": Peer(
        bind(cascade, cut=by_prefix, backend="fa2"),
        "FlashInfer's cascade, what a tree's rows share and the rest of each, its backend FA2",
        _heads_lack,
        _ordered,
    ),
    "flashinfer_prefix_auto": Peer(
        bind(cascade, cut=by_prefix, backend="auto"),
        "FlashInfer's cascade, what a tree's rows share and the rest of each, the backend that it "
        "takes: FA3 on Hopper",
        _heads_lack,
        _ordered,
    ),
    "flashinfer_masked": Peer(
        masked,
        "FlashInfer's prefill, one request for each tree, with a custom mask, its backend FA2",
        _masked_lacks,
        _ordered,
    ),
    "flashinfer_mla": Peer(
        bind(latent, cut=by_sequence),
        "FlashInfer's MLA, one request for each row, prefixes share pages",
        _latent_lacks,
        _latent_ordered,
    ),
    "flashinfer_mla_levels": Peer(
        bind(latent, cut=by_node),
        "FlashInfer's MLA, a level for each depth, merged",
        _latent_lacks,
        _latent_ordered,
    ),
    "flashinfer_mla_prefix": Peer(
        bind(latent, cut=by_prefix),
        "FlashInfer's MLA, what a tree's rows share and the rest of each, merged",
        _latent_lacks,
        _latent_ordered,
    ),
}
