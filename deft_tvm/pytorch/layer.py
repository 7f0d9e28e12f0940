"""Tree attention as a part of a torch model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deft_tvm.pytorch.attention import TreeAttention


class TreeAttentionModule(nn.Module):
    """`TreeAttention` as a part of a torch model; all layers may share one ``attention``.

    Plan with ``attention.plan`` outside the model, before each step.
    """

    def __init__(self, attention: TreeAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, q: Tensor, kv: Sequence[Tensor], sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """out and lse of one layer; see `TreeAttention.run`."""
        return self.attention.run(q, kv, sinks=sinks)

    def extra_repr(self) -> str:
        return str(self.attention.spec)
