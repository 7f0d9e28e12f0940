"""The decisions of one kernel, numbered, and the candidates that MetaSchedule makes of them.

A schedule's choices stand in a table, each with a closed list of candidates. Numbering them in a
mixed radix makes a decision one integer, so that "tried before" is a set and a neighbour a digit.

Candidates are schedules of the computation *specialised* to the shapes and strides of a real
launch: MetaSchedule's database and features want constants. The same decision, or the trace,
replays on the dynamic function.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from tvm import IRModule, s_tir, tirx
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule import _ffi_api
from tvm.s_tir.schedule import Trace
from tvm.target import Target

from deft_tvm.schedules import Decision, KernelTask, apply_rules, schedule
from deft_tvm.tuning.defaults import default_for
from deft_tvm.tuning.subject import Subject


class Space:
    """All decisions of a kernel on the launch of a subject.

    Attributes:
        subject: the kernel and its work.
        task: what the rules schedule.
        table: choices by name, in the order in which the rules sample them.
        start: number of the decision to start from, the default.
    """

    def __init__(self, subject: Subject, task: KernelTask) -> None:
        self.subject, self.task = subject, task
        sch, knobs = schedule(task)
        self.table = knobs.table
        self.start = self._number(self.decision_of(sch.trace) | default_for(task))

    def __len__(self) -> int:
        return math.prod(map(len, self.table.values()))

    def __getitem__(self, number: int) -> dict[str, int]:
        """Decision number `number`."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        decision = {}
        for name, candidates in self.table.items():
            number, digit = divmod(number, len(candidates))
            decision[name] = candidates[digit]
        return decision

    def number(self, decision: Decision) -> int | None:
        """The inverse; None for a decision that today's schedule does not know."""
        known = decision.keys() == self.table.keys() and all(
            decision[name] in candidates for name, candidates in self.table.items()
        )
        return self._number(decision) if known else None

    def _number(self, decision: Decision) -> int:
        number, weight = 0, 1
        for name, candidates in self.table.items():
            number += weight * candidates.index(decision[name])
            weight *= len(candidates)
        return number

    def neighbour(self, number: int, rng: random.Random) -> int:
        """The same decision but for one choice, moved a step up or down."""
        decision = self[number]
        name = rng.choice([name for name, values in self.table.items() if len(values) > 1])
        candidates = self.table[name]
        place = candidates.index(decision[name])
        steps = [step for step in (place - 1, place + 1) if 0 <= step < len(candidates)]
        return self._number(decision | {name: candidates[rng.choice(steps)]})

    def decision_of(self, trace: Trace) -> dict[str, int]:
        """The decision that a trace of this kernel took."""
        sampled = [inst for inst in trace.insts if inst.kind.name == "SampleCategorical"]
        return self._decision([int(trace.decisions[inst]) for inst in sampled])

    def number_at(self, places: Sequence[int]) -> int | None:
        """Number of the decision with these places among the candidates; None if there is none."""
        sizes = map(len, self.table.values())
        if len(places) != len(self.table) or any(map(operator.ge, places, sizes)):
            return None
        return self._number(self._decision(places))

    def _decision(self, places: Sequence[int]) -> dict[str, int]:
        return {
            name: candidates[place]
            for (name, candidates), place in zip(self.table.items(), places, strict=True)
        }

    @cached_property
    def module(self) -> IRModule:
        """The unscheduled kernel with the launch's shapes and strides as constants."""
        function = specialise(self.task.computation, self.subject.launch().arguments)
        return IRModule({self.task.symbol: function})

    @cached_property
    def arguments(self) -> list[ms.arg_info.ArgInfo]:
        return ms.arg_info.ArgInfo.from_prim_func(self.module[self.task.symbol])

    def context(self, strategy: ms.SearchStrategy | None = None) -> ms.TuneContext:
        """MetaSchedule's view of the space."""

        def sample(sch: s_tir.Schedule) -> None:
            apply_rules(self.task, sch, None)

        generator = ms.space_generator.ScheduleFn(
            sample, sch_rules=[], postprocs=[], mutator_probs={}
        )
        target, cores = Target(dict(self.task.target)), self.subject.device.cores
        return _Context(self.module, target, generator, strategy, self.subject.kernel, cores)

    def candidate(self, number: int) -> ms.MeasureCandidate:
        """Decision number `number` applied to the specialised kernel."""
        sch = s_tir.Schedule(self.module)
        apply_rules(self.task, sch, self[number])
        return ms.MeasureCandidate(sch, self.arguments)


class _Context(ms.TuneContext):
    """A TuneContext made without importing the tensor intrinsics of every target that TVM knows.

    MetaSchedule's own constructor does that, which takes 20 to 35 seconds, and none of them is used
    here.
    """

    def __init__(
        self,
        module: IRModule,
        target: Target,
        generator: ms.SpaceGenerator,
        strategy: ms.SearchStrategy | None,
        name: str,
        num_threads: int,
    ) -> None:
        random_state, logger = 1, None
        self.__init_handle_by_constructor__(
            _ffi_api.TuneContext,
            module,
            target,
            generator,
            strategy,
            name,
            num_threads,
            random_state,
            logger,
        )
        _ffi_api.TuneContextInitialize(self)


def specialise(function: tirx.PrimFunc, arguments: Sequence[Tensor]) -> tirx.PrimFunc:
    """`function` for exactly the shapes and strides of `arguments`."""
    pairs = zip(function.params, arguments, strict=True)
    return function.specialize({param: _buffer(param, tensor) for param, tensor in pairs})


def _buffer(param: Any, tensor: Tensor) -> tirx.Buffer:
    """A buffer as `param` declares it, with the tensor's extents in the same integer types."""
    shape = _constants(param.shape, tensor.shape)
    strides = _constants(param.strides, tensor.stride()) if len(param.strides) else None
    return tirx.decl_buffer(shape, param.dtype, strides=strides)


def _constants(declared: Sequence[Any], values: Sequence[int]) -> list[tirx.IntImm]:
    return [tirx.IntImm(str(d.ty), v) for d, v in zip(declared, values, strict=True)]
