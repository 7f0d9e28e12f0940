"""The contract between a computation and the schedules for it.

A rule takes the task of a partial kernel (for which spec, tile and target) and a fresh schedule of
its computation, and either schedules it or declines by returning False before it touched anything.
Rules are asked in order (see `apply`); the last one takes every task and leaves it as written. For
the merge each target has one schedule.

Schedules choose only through their `Knobs`: each choice has a name, a closed list of candidates and
a default. So a scheduled kernel is described by a `Decision`, a plain mapping that logs keep, that
people read, and that replays on the dynamic function what was found on a specialised one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tvm import s_tir, tirx

from deft_tvm.errors import PlanError
from deft_tvm.kernels.merge import merge_partials
from deft_tvm.kernels.partial import partial_attention
from deft_tvm.spec import AttentionSpec, TileShape

Decision = Mapping[str, int]


@dataclass(frozen=True)
class KernelTask(ABC):
    """One kernel to schedule.

    Attributes:
        spec: the attention.
        target: TVM target attributes: ``kind``, and ``mattr`` or ``arch``.
        features: instruction sets that the schedule may use, as in `DeviceProfile.features`.
    """

    spec: AttentionSpec
    target: Mapping[str, Any]
    features: frozenset[str]

    @property
    def kind(self) -> str:
        return str(self.target["kind"])

    @property
    @abstractmethod
    def name(self) -> str:
        """The kernel's name in logs and manifests."""

    @property
    @abstractmethod
    def symbol(self) -> str:
        """The function's name in the module."""

    @property
    @abstractmethod
    def computation(self) -> tirx.PrimFunc:
        """The unscheduled kernel."""


@dataclass(frozen=True)
class PartialTask(KernelTask):
    """Stage 1 for one tile class.

    Attributes:
        tile: the tile class.
        threads: that a CPU deals units out to.
    """

    tile: TileShape
    threads: int = 1

    @property
    def name(self) -> str:
        return self.tile.name

    @property
    def symbol(self) -> str:
        return f"partial_{self.tile.name}"

    @cached_property
    def computation(self) -> tirx.PrimFunc:
        return partial_attention(self.spec, self.tile, self.kind, self.symbol, self.threads)


class MergeTask(KernelTask):
    """Stage 2."""

    name = symbol = "merge"

    @cached_property
    def computation(self) -> tirx.PrimFunc:
        return merge_partials(self.spec, self.kind, self.symbol)


def tiles_of(tasks: Iterable[KernelTask]) -> tuple[TileShape, ...]:
    """The tile classes of the partial kernels among `tasks`."""
    return tuple(task.tile for task in tasks if isinstance(task, PartialTask))


@dataclass
class Knobs:
    """The choices of one schedule, by name.

    With ``decision=None`` every choice is left to be sampled by the search; otherwise a choice is
    what `decision` says, or its default. `table` records every choice made, name → candidates, and
    `taken` what was taken where nothing is left to be sampled.
    """

    sch: s_tir.Schedule
    decision: Decision | None
    table: dict[str, tuple[int, ...]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def pick(self, name: str, candidates: Sequence[int], default: int) -> Any:
        """One sampled integer, as a random variable of the schedule's trace."""
        return self._pick(name, candidates, candidates, default)

    def pick_number(self, name: str, candidates: Sequence[int], default: int) -> int:
        """The same as a plain number, for what no random variable can say, as an intrinsic's
        name: a trace then replays with its own decision alone."""
        return int(self.sch.get(self.pick(name, candidates, default)))

    def pick_parts(self, name: str, extent: int, sizes: Sequence[int], default: int) -> Any:
        """A size of equal parts, sampled as their number: what two loops can be split into alike.

        A trace keeps no arithmetic on what was sampled, so it cannot keep ``extent // size``.
        """
        return self._pick(name, sizes, [extent // size for size in sizes], default)

    def _pick(
        self, name: str, candidates: Sequence[int], values: Sequence[int], default: int
    ) -> Any:
        self.table[name] = tuple(candidates)
        weights = [1.0 / len(candidates)] * len(candidates)
        if self.decision is None:
            return self.sch.sample_categorical(list(values), weights)
        self.taken[name] = self.decision.get(name, default)
        index = self._index(name, candidates, self.taken[name])
        return self.sch.sample_categorical(list(values), weights, decision=index)

    def _index(self, name: str, candidates: Sequence[int], value: int) -> int:
        if value not in candidates:
            raise PlanError(f"decision {name!r} is {value}; expected one of {tuple(candidates)}")
        return list(candidates).index(value)


Rule = Callable[[PartialTask, s_tir.Schedule, Knobs], bool]
