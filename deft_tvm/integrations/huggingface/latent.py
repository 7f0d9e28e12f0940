"""Latent attention of a layer whose code expands latents: absorbed by views of its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deft_tvm.errors import InputError
from deft_tvm.pytorch import absorb_query, expand_output
from deft_tvm.spec import AttentionSpec


class Absorbed:
    """The up-projections of one layer, ``W_UK`` and ``W_UV`` of `deft_tvm.absorb_query`."""

    def __init__(self, module: Any, spec: AttentionSpec, q_width: int) -> None:
        """
        Args:
            module: the layer's attention, with ``kv_b_proj``.
            spec: of the layer.
            q_width: of a query before absorption, nope and rope.

        Raises:
            InputError: the projection is no plain linear layer of the right shape.
        """
        heads, rank = spec.num_q_heads, spec.k_width
        self._rope = spec.rope_width
        nope = q_width - self._rope
        weight = _weight(module)
        if weight.shape[1] != rank or weight.shape[0] % heads or weight.shape[0] <= heads * nope:
            raise InputError(
                f"kv_b_proj.weight has shape {list(weight.shape)}; expected [{heads} heads of "
                f"{nope} + a value's width, {rank}]"
            )
        up = weight.view(heads, -1, rank)
        self._w_uk, self._w_uv = up[:, :nope], up[:, nope:]

    def query(self, q: Tensor) -> Tensor:
        """``[rows, heads, nope + rope]`` → ``[rows, heads, latent + rope]``."""
        nope = q.shape[-1] - self._rope
        return absorb_query(q[..., :nope], q[..., nope:], self._w_uk)

    def output(self, out: Tensor) -> Tensor:
        """``[rows, heads, latent]`` → ``[rows, heads, value width]``."""
        return expand_output(out, self._w_uv)


def _weight(module: Any) -> Tensor:
    projection: Any = getattr(module, "kv_b_proj", None)
    # An adapter or a quantised layer computes something else than its weight says.
    plain = type(projection) is torch.nn.Linear
    if not plain or projection.bias is not None:
        raise InputError(
            f"kv_b_proj is {type(projection).__name__}{' with bias' * plain}; expected a "
            f"torch.nn.Linear without bias, whose weight can be absorbed"
        )
    weight: Tensor = projection.weight
    return weight
