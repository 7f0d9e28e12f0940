"""What no implementation can be faster than: bytes at the read bandwidth, FLOPs at the matrix rate.

Both rates are probed in the same rounds as what they limit, so that a slow second slows all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from msgspec import field

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.plan.cost import token_bytes
from deft_tvm.plan.split import Walk
from deft_tvm.plan.traffic import row_tokens, visible_flops
from deft_tvm.spec import AttentionSpec
from deft_tvm.timing import Summary, Timing
from deft_tvm.tree import Forest

if TYPE_CHECKING:
    import torch

READ, PRODUCT = "read", "product"
READ_BYTES = 128 << 20
"""Several times what caches hold, and some five milliseconds to sum."""
PRODUCT_SIZE = 1024
"""Rows and columns of the square matrices: 2.1 GFLOP."""


class Limit(msgspec.Struct, frozen=True):
    """Bytes and FLOPs that a step cannot do without, whoever computes it.

    Attributes:
        num_bytes: of a step K and V of every token that some row sees, once.
        flops: both products over the visible (row, token) pairs.
    """

    num_bytes: int = field(name="kv_bytes")
    flops: int

    @classmethod
    def of(cls, forest: Forest, spec: AttentionSpec) -> Limit:
        """Of one layer and step."""
        seen = int(row_tokens(forest, spec.window).sum())
        return cls(
            num_bytes=int(Walk.of(forest, spec.window).length.sum()) * token_bytes(spec),
            flops=visible_flops(spec, seen),
        )

    def seconds(self, read: float, product: float) -> float:
        """The larger of both times, by the seconds of the two probes."""
        return max(
            self.num_bytes / READ_BYTES * read,
            self.flops / (2 * PRODUCT_SIZE**3) * product,
        )

    def on(self, device: DeviceProfile, dtype: str) -> float:
        """Seconds by the rates of a device, for operands of `dtype` or what it converts them to."""
        return max(self.num_bytes / device.read_bandwidth, self.flops / device.product_rate(dtype))

    def rounds(self, timings: dict[str, Timing]) -> tuple[float, ...]:
        """The limit in each round of a measurement that has the probes."""
        pairs = zip(timings[READ].seconds, timings[PRODUCT].seconds, strict=True)
        return tuple(self.seconds(*pair) for pair in pairs)

    def share(self, timings: dict[str, Timing], name: str) -> Summary:
        """What part of its time a call would take at the limit."""
        pairs = zip(self.rounds(timings), timings[name].seconds, strict=True)
        return Summary.of(tuple(limit / own for limit, own in pairs))


def product_dtype(dtype: torch.dtype, kind: Kind = "cpu") -> torch.dtype:
    """`DeviceProfile.product_dtype` of this machine's device, for torch."""
    import torch  # as below

    name = DeviceProfile.detect(kind).product_dtype(str(dtype).removeprefix("torch."))
    found: torch.dtype = getattr(torch, name)
    return found


def probes(dtype: torch.dtype, kind: Kind = "cpu") -> dict[str, Callable[[], object]]:
    """Calls that read `READ_BYTES` and multiply two matrices, on all of a CPU or GPU."""
    import torch  # here: who compares logs needs the names of these probes alone

    buffer = torch.ones(READ_BYTES // 4, device=kind)
    # Random: a GPU takes less power for ones, and clocks higher.
    x = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=kind).to(product_dtype(dtype, kind))
    out = torch.empty_like(x)
    return {READ: buffer.sum, PRODUCT: lambda: torch.mm(x, x, out=out)}
