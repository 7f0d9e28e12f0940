"""A process of its own for what may crash or hang: ``python -m deft_tvm.tuning.worker build|time``.

Reads one request a line from standard input and answers each with a line on standard output, until
the input ends. Building imports the compiler; timing does not, and runs a library as a user's
process does: the same loader's thread pool, the same arguments.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial
from typing import Any

import msgspec
import torch
import tvm_ffi

from deft_tvm import threads
from deft_tvm.device import DeviceProfile
from deft_tvm.limit import probes
from deft_tvm.native import TORCH_POOL, compile_c
from deft_tvm.timing import measure
from deft_tvm.tuning.expected import Expected, expected
from deft_tvm.tuning.messages import (
    Answer,
    Build,
    Built,
    Failed,
    Outcome,
    Ready,
    Request,
    Time,
    Timed,
    brief,
)
from deft_tvm.tuning.subject import Launch, cold_bytes

MOST_SAMPLES = 30


def main(role: str) -> None:
    """Answer requests until the input ends; what libraries print goes to standard error."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if role == "build":
        import deft_tvm.build  # noqa: F401  (seconds, before the first request)
    _write(answers, Ready())
    for line in sys.stdin.buffer:
        _write(answers, _answer(msgspec.json.decode(line, type=Request)))


def _write(stream: Any, answer: Answer) -> None:
    stream.write(msgspec.json.encode(answer) + b"\n")
    stream.flush()


def _answer(request: Request) -> Answer:
    try:
        return _build(request) if isinstance(request, Build) else _time(request)
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """Also in the middle of a candidate that never ends; Linux only, elsewhere at the next line."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _build(request: Build) -> Built:
    from tvm.ir import load_json

    from deft_tvm.build import compile_module

    module = load_json(request.module)
    begin = time.perf_counter()
    executable = compile_module(module, request.target)
    on_cpu = request.target["kind"] == "llvm"
    # A list of its own: export_library adds to it.
    addons = [*_torch_pool(os.path.dirname(request.path))] if on_cpu else None
    executable.export_library(request.path, addons=addons)
    return Built(time.perf_counter() - begin)


@cache
def _torch_pool(directory: str) -> tuple[str, ...]:
    return tuple(compile_c(TORCH_POOL, directory))


def _time(request: Time) -> Timed:
    launch = request.subject.launch()
    device = request.subject.device
    finish = torch.cuda.synchronize if device.kind == "cuda" else None
    outcomes: dict[str, Outcome] = {}
    calls: dict[str, Callable[[], object]] = {}
    for library in request.libraries:
        try:
            call = partial(_load(library, request.function, device), *launch.arguments)
            outcomes[library] = _check(call, launch)
        except Exception as error:
            outcomes[library] = Outcome("runtime", error=brief(f"{type(error).__name__}: {error}"))
        if outcomes[library].status == "ok":
            calls[library] = call
    anchors = probes(launch.case.q.dtype, device.kind) if request.anchored and calls else {}
    timings = measure(
        {**calls, **anchors},
        budget=request.seconds,
        warmup=1,
        most_rounds=MOST_SAMPLES,
        cold_bytes=cold_bytes(device),
        synchronize=finish,
    )
    anchor_us = _microseconds(launch.limit.rounds(timings)) if anchors else ()
    for library in calls:
        outcomes[library] = msgspec.structs.replace(
            outcomes[library],
            latency_us=_microseconds(timings[library].seconds),
            anchor_us=anchor_us,
        )
    return Timed(tuple(outcomes[library] for library in request.libraries))


def _microseconds(seconds: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(1e6 * each, 3) for each in seconds)


def _load(library: str, function: str, device: DeviceProfile) -> Callable[..., object]:
    if device.kind == "cuda":
        import tvm  # noqa: F401  (its CUDA runtime)
    else:
        torch.set_num_threads(device.cores)
    module = tvm_ffi.load_module(library)
    if device.kind == "cpu":
        threads.adopt_pool(library)
    return module.get_function(function)


def _check(call: Callable[[], object], launch: Launch) -> Outcome:
    """Run once, over outputs full of NaN, and compare with what must be there."""
    for tensor in launch.outputs:
        tensor.fill_(torch.nan)
    call()
    error, right = _expected(launch).error(launch.outputs)
    text = "" if right else f"the largest error is {error:.3g}; expected {_expected(launch).bound}"
    finite = round(error, 9) if error < float("inf") else None
    return Outcome("ok" if right else "wrong", max_error=finite, error=text)


@lru_cache(maxsize=16)
def _expected(launch: Launch) -> Expected:
    return expected(launch)


if __name__ == "__main__":
    main(sys.argv[1])
