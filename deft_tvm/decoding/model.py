"""What decoding asks of a model."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from deft_tvm.pytorch import Step


class Model(Protocol):
    """Any callable from new tokens to logits; it keeps nothing, all KV is in the step's cache."""

    def __call__(self, tokens: Tensor, step: Step, keep: Tensor, /) -> Tensor:
        """One pass through all layers.

        Args:
            tokens: int64[rows], in the order of the step's rows.
            step: ``step.positions`` are the tokens' positions, by which q and k are rotated, and
                ``step.attend(layer, q, k, v)`` is to be called once in each layer.
            keep: int64[n], rows whose logits are wanted; n may be 0.

        Returns:
            ``[n, vocabulary]``, the logits of what follows these rows, in any floating dtype.
        """
        ...
