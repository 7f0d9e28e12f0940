"""Tree attention that tunes itself to the device it runs on.

Names are imported when they are first used, so that ``import deft_tvm`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft_tvm import errors
    from deft_tvm.context import context_part, divide_context
    from deft_tvm.device import DeviceProfile
    from deft_tvm.errors import DeftError
    from deft_tvm.fp8 import dequantize, quantize
    from deft_tvm.pages import PageTable
    from deft_tvm.plan import Plan, Traffic
    from deft_tvm.pool import PagePool
    from deft_tvm.pytorch import (
        PagedKVCache,
        Step,
        TreeAttention,
        TreeAttentionModule,
        absorb_query,
        apply_sinks,
        expand_output,
        gather_heads,
        load,
        merge_ranks,
        merge_states,
    )
    from deft_tvm.spec import AttentionSpec
    from deft_tvm.tree import Forest

    __version__: str

__all__ = [
    "AttentionSpec",
    "DeftError",
    "DeviceProfile",
    "Forest",
    "PagePool",
    "PageTable",
    "PagedKVCache",
    "Plan",
    "Step",
    "Traffic",
    "TreeAttention",
    "TreeAttentionModule",
    "absorb_query",
    "apply_sinks",
    "context_part",
    "dequantize",
    "divide_context",
    "errors",
    "expand_output",
    "gather_heads",
    "load",
    "merge_ranks",
    "merge_states",
    "quantize",
]

_HOMES = {
    "AttentionSpec": "spec",
    "DeftError": "errors",
    "DeviceProfile": "device",
    "Forest": "tree",
    "PagePool": "pool",
    "PageTable": "pages",
    "PagedKVCache": "pytorch",
    "Plan": "plan",
    "Step": "pytorch",
    "Traffic": "plan",
    "TreeAttention": "pytorch",
    "TreeAttentionModule": "pytorch",
    "absorb_query": "pytorch",
    "apply_sinks": "pytorch",
    "context_part": "context",
    "dequantize": "fp8",
    "divide_context": "context",
    "expand_output": "pytorch",
    "gather_heads": "pytorch",
    "load": "pytorch",
    "merge_ranks": "pytorch",
    "merge_states": "pytorch",
    "quantize": "fp8",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name == "errors":
        value = import_module("deft_tvm.errors")
    elif name in _HOMES:
        value = getattr(import_module(f"deft_tvm.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'deft_tvm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("deft-tvm")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "0+unknown"
