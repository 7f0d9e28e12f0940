"""What a peer is, and why one may not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deft_tvm.peers.gathered import Gathered

Call = Callable[[], Any]

MOST_COPIED = 6 << 30
"""Bytes of copies of KV, or of a mask, beyond which a peer does not run: few machines have room."""


@dataclass(frozen=True)
class Peer:
    """One way to compute tree attention.

    Attributes:
        make: prepares a case and returns the call to time.
        setting: how it is set at its best, in one line.
        lacks: why it cannot run a case; None where it can.
        ordered: [rows, query heads, v_width] in the caller's order, from what the call returned.
    """

    make: Callable[[Gathered], Call]
    setting: str
    lacks: Callable[[Gathered], str | None]
    ordered: Callable[[Gathered, Any], Tensor]


def on_cpus_alone(gathered: Gathered) -> str | None:
    """Of a peer whose kernel is written for CPUs."""
    kind = gathered.q.device.type
    return None if kind == "cpu" else f"its kernel is for CPUs, and q is on {kind}"


def no_cap_and_no_sinks(gathered: Gathered) -> str | None:
    """What plain softmax attention cannot do."""
    spec = gathered.case.spec
    if spec.soft_cap is not None:
        return "it has no soft cap"
    return "it has no sinks" if spec.sinks else None


def too_large(what: str, size: int) -> str | None:
    return f"its {what} {size / 2**30:.1f} GiB" if size > MOST_COPIED else None
