"""Which tiles, and how long a piece of KV: tried on the device, a few choices at a time."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from statistics import median
from typing import Generic, TypeVar

import torch

from deft_tvm.errors import InputError
from deft_tvm.peers.triton.launch import Step, Tiling, block
from deft_tvm.spec import AttentionSpec
from deft_tvm.timing import Events, captured

WARM_UP, ROUNDS = 2, 7
MOST_ACCUMULATED = 8192
"""Elements of the output that four warps hold."""
LIGHT = 320
"""Columns of a token and KV head, up to which twice as many tokens fit into a step."""

Choice = TypeVar("Choice")

_log = logging.getLogger(__name__)


def tilings(spec: AttentionSpec, lanes: int) -> tuple[Tiling, Tiling]:
    """Ways to walk a tile of so many lanes, the likelier one first.

    All keep what they hold in registers and 227 KiB of shared memory on an NVIDIA H100, and all
    but those of 512 columns leave room for a second program on a multiprocessor.
    """
    values = block(spec.v_width)
    warps = 8 if lanes * values > MOST_ACCUMULATED or values > 256 else 4
    columns = loaded(spec)
    if columns <= LIGHT:
        return Tiling(lanes, 64, warps, 5), Tiling(lanes, 32, warps, 7)
    registers = 128 if lanes == 16 and warps == 8 else None
    return Tiling(lanes, 32, warps, 5, registers), Tiling(lanes, 64, warps, 3, registers)


def loaded(spec: AttentionSpec) -> int:
    """Columns that a kernel loads for a token and KV head."""
    columns = block(spec.v_width) + (0 if spec.tied else block(spec.k_width))
    return columns + (block(spec.rope_width) if spec.rope_width else 0)


class Search(Generic[Choice]):
    """Choices that were tried so far, and how long a step takes by each."""

    def __init__(self, made: Callable[[Choice], Step]) -> None:
        self.made = made
        self.times: dict[Choice, float] = {}

    def fastest(self, choices: Iterable[Choice]) -> Choice:
        """The choice whose step takes the least time on the device.

        Those that need more registers or memory than there are do not count. Where there is
        no device that can be timed, it is the first.

        Raises:
            InputError: none of them can run.
        """
        left = list(dict.fromkeys(choices))
        if len(left) == 1 or interpreted() or not torch.cuda.is_available():
            return left[0]
        for choice in left:
            if choice not in self.times:
                self.times[choice] = self._time(choice)
        best = min(left, key=self.times.__getitem__)
        if math.isinf(self.times[best]):
            raise InputError(f"none of {left} fits this device; expected one that does")
        return best

    def settled(self, choice: Choice) -> Step:
        """The step of a choice, compiled: a graph that captures it finds kernels to launch."""
        step = self.made(choice)
        if not interpreted():
            step()
        return step

    def _time(self, choice: Choice) -> float:
        from triton.runtime.errors import OutOfResources

        try:
            found = seconds(self.made(choice))
        except (OutOfResources, torch.cuda.OutOfMemoryError) as error:
            _log.info("%s: %s", choice, error)
            return math.inf
        _log.info("%s: %.1f µs", choice, 1e6 * found)
        return found


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def seconds(step: Step) -> float:
    """Median of a few calls from a captured graph, without KV in the device's cache."""
    graph, timed = captured(step, WARM_UP), Events()  # the first call compiles
    times = [timed(graph.replay) for _ in range(WARM_UP + ROUNDS)]
    return median(times[WARM_UP:])
