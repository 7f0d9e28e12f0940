"""Tree attention in torch: plan and run, operators for compile and export, merging of states."""

from __future__ import annotations

from deft_tvm.pytorch.attention import TreeAttention, load
from deft_tvm.pytorch.cache import PagedKVCache, Step
from deft_tvm.pytorch.distributed import gather_heads, merge_ranks
from deft_tvm.pytorch.latent import absorb_query, expand_output
from deft_tvm.pytorch.layer import TreeAttentionModule
from deft_tvm.pytorch.merge import merge_states
from deft_tvm.pytorch.sinks import apply_sinks

__all__ = [
    "PagedKVCache",
    "Step",
    "TreeAttention",
    "TreeAttentionModule",
    "absorb_query",
    "apply_sinks",
    "expand_output",
    "gather_heads",
    "load",
    "merge_ranks",
    "merge_states",
]
