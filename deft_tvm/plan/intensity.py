"""What a spec caches and computes on each of several tensor-parallel devices.

A token of one layer is read once for all rows that share it, and each row multiplies it with every
query head of the device: FLOPs a byte grow with the rows, and where they pass the device's ridge,
FLOP/s over bytes/s, sharing KV gains nothing more (arXiv 2505.21487, section 3.1 and table 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from deft_tvm.errors import SpecError
from deft_tvm.spec import AttentionSpec

DEGREES = (1, 2, 4, 8)
ROWS = (1, 2, 4)


@dataclass(frozen=True)
class Share:
    """One of `degree` devices.

    Attributes:
        degree: how many devices divide the heads.
        num_q_heads: query heads of one.
        num_kv_heads: KV or latent heads of one.
        kv_bytes: bytes of cache that a token of one layer takes on one.
        copied_bytes: bytes of all devices together beyond one copy of the cache.
        flops_per_byte: by rows that share the token.
    """

    degree: int
    num_q_heads: int
    num_kv_heads: int
    kv_bytes: int
    copied_bytes: int
    flops_per_byte: dict[int, float]


def shares(spec: AttentionSpec) -> list[Share]:
    """One of the devices at each of `DEGREES` that divides the heads of `spec`."""
    found = []
    for degree in DEGREES:
        try:
            shard = spec.shard(0, degree)
        except SpecError:
            continue
        flops = 2 * shard.num_q_heads * (shard.q_width + shard.v_width)
        size = shard.kv_bytes_per_token
        found.append(
            Share(
                degree=degree,
                num_q_heads=shard.num_q_heads,
                num_kv_heads=shard.num_kv_heads,
                kv_bytes=size,
                copied_bytes=degree * size - spec.kv_bytes_per_token,
                flops_per_byte={count: count * flops / size for count in ROWS},
            )
        )
    return found
