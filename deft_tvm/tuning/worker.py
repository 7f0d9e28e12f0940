"""A process of its own for what may crash or hang: ``python -m deft_tvm.tuning.worker build|time``.

Reads one request a line from standard input and answers each with a line on standard output, until
the input ends. Building imports the compiler; timing does not, and runs a library as a user's
process does: the same loader's thread pool, the same arguments.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial

import msgspec
import torch
import tvm_ffi

from deft_tvm import threads
from deft_tvm.device import DeviceProfile, gpu_error
from deft_tvm.limit import probes
from deft_tvm.manifest import installed_versions
from deft_tvm.native import TORCH_POOL, compile_c
from deft_tvm.timing import Events, measure
from deft_tvm.tuning.child import answers_alone, end_with_parent, write_line
from deft_tvm.tuning.expected import Expected, expected
from deft_tvm.tuning.messages import (
    Answer,
    Build,
    Built,
    Failed,
    Outcome,
    Profile,
    Profiled,
    Ready,
    Request,
    Time,
    Timed,
    brief,
)
from deft_tvm.tuning.probe import known_device
from deft_tvm.tuning.subject import Launch, cold_bytes, forget_launches

MOST_SAMPLES = 30


def main(role: str) -> None:
    """Answer requests until the input ends."""
    end_with_parent()
    answers = answers_alone()
    if role == "build":
        import deft_tvm.build  # noqa: F401  (seconds, before the first request)
    write_line(answers, msgspec.json.encode(Ready()))
    for line in sys.stdin.buffer:
        answer = _answer(msgspec.json.decode(line, type=Request))
        if error := gpu_error():
            sys.exit(error)
        write_line(answers, msgspec.json.encode(answer))


def _answer(request: Request) -> Answer:
    try:
        match request:
            case Build():
                return _build(request)
            case Time():
                return _time(request)
            case Profile():
                return Profiled(known_device(kind=request.kind), installed_versions())
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


def _build(request: Build) -> Built:
    from tvm.ir import load_json

    from deft_tvm.build import compile_module

    module = load_json(request.module)
    begin = time.perf_counter()
    executable = compile_module(module, request.target)
    on_cpu = request.target["kind"] == "llvm"
    path = os.path.abspath(request.path)
    # A list of its own: export_library adds to it.
    addons = [*_torch_pool(os.path.dirname(path))] if on_cpu else None
    executable.export_library(path, addons=addons)
    return Built(time.perf_counter() - begin)


@cache
def _torch_pool(directory: str) -> tuple[str, ...]:
    return tuple(compile_c(TORCH_POOL, directory))


def _time(request: Time) -> Timed:
    if request.rounds:
        forget_launches()
        _expected.cache_clear()
    launch = request.subject.launch()
    device = request.subject.device
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
    anchors = probes(launch.case.q.dtype, device.kind) if request.rounds and calls else {}
    timings = measure(
        {**calls, **anchors},
        budget=request.seconds,
        warmup=1,
        most_rounds=request.rounds or MOST_SAMPLES,
        cold_bytes=cold_bytes(device),
        stopwatch=Events(cold_bytes(device)) if device.kind == "cuda" else None,
    )
    anchor_us = _microseconds(launch.limit.rounds(timings)) if anchors else ()
    probe_us = {name: _microseconds(timings[name].seconds) for name in anchors}
    for library in calls:
        outcomes[library] = msgspec.structs.replace(
            outcomes[library],
            latency_us=_microseconds(timings[library].seconds),
            anchor_us=anchor_us,
            probe_us=probe_us,
        )
    return Timed(tuple(outcomes[library] for library in request.libraries))


def _microseconds(seconds: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(1e6 * each, 3) for each in seconds)


def _load(library: str, function: str, device: DeviceProfile) -> Callable[..., object]:
    if device.kind == "cuda":
        import tvm  # noqa: F401  (its CUDA runtime)
    else:
        torch.set_num_threads(device.cores)
    path = os.path.abspath(library)
    module = tvm_ffi.load_module(path)
    if device.kind == "cpu":
        threads.adopt_pool(path)
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
