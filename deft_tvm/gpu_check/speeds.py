"""What `bench` measures: cells, and what is found of each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from datetime import datetime, timezone

import msgspec
import torch

from deft_tvm.bench.core import Cell
from deft_tvm.check import Exactness
from deft_tvm.device import DeviceProfile
from deft_tvm.gpu_check.cells import SPEEDS
from deft_tvm.gpu_check.rates import Rates
from deft_tvm.limit import Limit
from deft_tvm.manifest import installed_versions, source_commit
from deft_tvm.tuning.log import measured

FILE = "bench.jsonl"
# The more telling first, for a run that is cut short.
WORKLOADS = (
    "few_shot:prompt=4000,branches=32",
    "speculative:nodes=64,context=1000",
    "multi_step",
    "few_shot:prompt=16000,branches=64",
    "sequences",
    "forest",
    "speculative:nodes=64,context=16000",
    "few_shot:prompt=1000,branches=8",
    "long",
    "speculative:nodes=64,context=4000",
    "few_shot:prompt=1000,branches=32",
    "few_shot:prompt=4000,branches=8",
    "few_shot:prompt=4000,branches=64",
    "few_shot:prompt=16000,branches=32",
    "few_shot:prompt=1000,branches=64",
    "few_shot:prompt=16000,branches=8",
)
PAPERS = ("node", "node_chunk", "flatten")
"""Groupings of DeFT."""


def cells_of(trees: Iterable[str]) -> list[Cell]:
    """Every workload under every attention, one attention after the other.

    Args:
        trees: files of recorded trees, whose widest step is a workload, too.
    """
    recorded = [f"recorded:path={path}" for path in trees]
    return [Cell(workload, spec) for workload in (*WORKLOADS, *recorded) for spec in SPEEDS]


class Begun(msgspec.Struct, frozen=True, tag=True):
    """A process began to measure.

    Attributes:
        rates: of the device, as measured.
        planned_by: the profile by whose rates plans are made.
        date: UTC.
        commit: of the source tree, empty outside one.
        versions: of the packages that have a part in it.
    """

    rates: Rates
    planned_by: DeviceProfile
    date: str
    commit: str
    versions: dict[str, str]

    @classmethod
    def now(cls, rates: Rates) -> Begun:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        planned_by = measured(DeviceProfile.detect(rates.device.kind))
        return cls(rates, planned_by, date, source_commit(), installed_versions())


class Ours(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One cell by our kernels.

    Attributes:
        cell: which.
        seconds: of one run, in each of some rounds.
        plan: seconds of the host for one plan, beside which the device may work.
        copies: of the step, which were called in turn.
        limit: bytes and FLOPs that the step cannot do without.
        exactness: beside float64.
        grouping: that the plan chose.
        items: of the plan.
        module: the folder's name of the artifact.
        tuned: whether it has decisions of a log.
        failed: why there is nothing.
    """

    cell: Cell
    seconds: tuple[float, ...] = ()
    plan: float = 0.0
    copies: int = 0
    limit: Limit | None = None
    exactness: Exactness | None = None
    grouping: str = ""
    items: int = 0
    module: str = ""
    tuned: bool = False
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Beside(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One cell in another way: by a peer, or by our kernels with another grouping.

    Attributes:
        cell: which.
        name: of the peer or grouping.
        seconds: of one call, in each of some rounds.
        copies: of the step, which were called in turn.
        in_graph: whether they were one CUDA graph; otherwise launches may have been waited for.
        max_error: from our output.
        rms_error: the same, in the square mean, as a part of our output's.
        failed: why there is no time, or why it does not count.
    """

    cell: Cell
    name: str
    seconds: tuple[float, ...] = ()
    copies: int = 0
    in_graph: bool = True
    max_error: float = 0.0
    rms_error: float = 0.0
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Found = Begun | Ours | Beside

MOST_RMS = 0.01
"""Roundings to 16 bits leave a third of it; a single token too many among thousands leaves more."""
MOST_BOUNDS = 4
"""As many times as far off as rounding may bring ours: some peers round partial results, too."""


def difference(found: torch.Tensor, ours: torch.Tensor) -> tuple[float, float]:
    """The largest difference, and in the square mean, as a part of ours; infinite for a NaN."""
    error = (found.double() - ours.double()).nan_to_num(torch.inf)
    size = float(ours.double().square().mean().sqrt())
    return float(error.abs().max()), float(error.square().mean().sqrt()) / max(size, 1e-30)


def verdict(max_error: float, rms_error: float, bound: float) -> str:
    """Why a peer that is so far off is wrong; empty where it is not."""
    if rms_error > MOST_RMS or max_error > MOST_BOUNDS * bound:
        return f"it is wrong: off by {max_error:.3g} at most, {rms_error:.2%} in the square mean"
    return ""
