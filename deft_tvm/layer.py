"""A layer's tensors beside q: its cache buffers, the scales of those in 8 bits, its sinks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deft_tvm.spec import AttentionSpec


def kernel_operands(spec: AttentionSpec, layer: Sequence[Tensor]) -> list[Tensor]:
    """What stage 1 takes after q of a layer's tensors, and as it takes them.

    Args:
        spec: its `AttentionSpec.operands` names them.
        layer: with caches ``[pages, ...]``, also where there is but one page.

    Returns:
        Views: bytes of 8-bit caches, and a scale for each page where one was given for all.
    """
    if spec.scaled:
        layer = list(layer)
        for scales, cache in enumerate(spec.scaled, len(spec.buffers)):
            layer[cache] = layer[cache].view(torch.uint8)
            if layer[scales].dim() == 1:
                layer[scales] = layer[scales].expand(layer[cache].shape[0], -1)
    return [layer[number] for number in spec.operands]
