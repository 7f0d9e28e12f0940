"""Measures what a device reaches: the rates by which plans are priced. Two to three seconds.

Rates are torch's, and the best that was seen: a plan wants to know what the hardware gives when
nobody else uses it; how much of that our kernels reach is the cost model's business.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import msgspec
import torch

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.files import AnyPath
from deft_tvm.timing import Events, captured
from deft_tvm.tuning.log import DEVICE, writable_root
from deft_tvm.tuning.result import Listener, Progress, ignore

FEWEST_ROUNDS = 3
SECONDS = 0.4
"""Of measuring one rate: long enough to meet a moment in which no other process has a core."""

BUSY_SECONDS = 1e-4
"""A longer launch waited for a core that another process had, and is not believed."""

LAUNCHES = 256
"""Kernels of the graph in which a GPU's launch is timed."""

MATRIX_SIZES = {"cpu": (512, 2048), "cuda": (2048, 8192)}
LONGEST_PRODUCT = 1.0
"""Seconds that one product may take: some types have no fast kernel, and no larger one is tried."""


def probe(device: DeviceProfile | None = None) -> DeviceProfile:
    """`device`, by default this machine's CPU, with its rates as measured now."""
    device = device or DeviceProfile.detect()
    return msgspec.structs.replace(
        device,
        read_bandwidth=_read_bandwidth(device),
        matrix_rate={name: _matrix_rate(device, name) for name in device.matrix_rate},
        launch_seconds=_launch_seconds(device),
        measured=True,
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def device_file(device: DeviceProfile, root: AnyPath | None = None) -> Path:
    """Where the measured profile of `device` is kept, under `root` as in `writable_root`."""
    return writable_root(root) / device.slug / DEVICE


def write_profile(device: DeviceProfile, root: AnyPath | None = None) -> Path:
    """Keep a profile with the logs; a reader sees the old one or the new one."""
    path = device_file(device, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    device.write(path)
    return path


def kept(device: DeviceProfile, root: AnyPath | None = None) -> DeviceProfile:
    """The profile beside the logs of a measured device, which is `device` if it is the first."""
    if not device.measured:
        return device
    file = device_file(device, root)
    if not file.is_file():
        write_profile(device, root)
    return DeviceProfile.read(file)


def known_device(
    root: AnyPath | None = None, listener: Listener = ignore, kind: Kind = "cpu"
) -> DeviceProfile:
    """This machine's CPU or GPU with its rates, which are measured the first time and kept."""
    device = DeviceProfile.detect(kind)
    file = device_file(device, root)
    if not file.is_file():
        listener(Progress("device", "measuring what this machine reaches"))
        write_profile(probe(device), root)
    return DeviceProfile.read(file)


def copy_bandwidth(device: DeviceProfile) -> float:
    """Bytes per second, read plus written, of a kernel that copies far more than caches hold.

    The better one of torch's ``copy_``, which on a GPU may be a slower engine's, and of a kernel
    that changes signs on the way; medians.
    """
    x = torch.randn(_size(device) // 4, device=device.kind)
    y = torch.empty_like(x)
    ways = (partial(y.copy_, x), partial(torch.neg, x, out=y))
    return 2 * x.nbytes / min(statistics.median(_seconds(device, way)) for way in ways)


def _size(device: DeviceProfile) -> int:
    """Bytes far beyond what caches hold."""
    least = 256 << 20 if device.kind == "cpu" else 2 << 30
    return max(least, 4 * (device.l3_bytes or device.l2_bytes))


def _read_bandwidth(device: DeviceProfile) -> float:
    """Bytes per second of a sum over far more than the last-level cache holds."""
    buffer = torch.ones(_size(device) // 4, device=device.kind)
    return buffer.nbytes / _best_seconds(device, buffer.sum)


def _matrix_rate(device: DeviceProfile, dtype: str) -> float:
    """FLOP per second of the largest square product that does not take too long.

    Of random numbers: a GPU takes less power for ones, and clocks higher.
    """
    rate = 0.0
    for n in MATRIX_SIZES[device.kind]:
        if rate and 2 * n**3 / rate > LONGEST_PRODUCT:
            break
        x = torch.randn(n, n, device=device.kind).to(getattr(torch, dtype))
        out = torch.empty_like(x)
        seconds = _best_seconds(device, partial(torch.mm, x, x, out=out))
        rate = max(rate, 2 * n**3 / seconds)
    return rate


def _launch_seconds(device: DeviceProfile) -> float:
    """Of the smallest operator that torch gives to all cores; on a GPU of one in a CUDA graph."""
    buffer = torch.zeros(1 << 16, device=device.kind)
    if device.kind == "cuda":  # not by `zero_`, which is no kernel there
        graph = captured(lambda: [buffer[:32].add_(1.0) for _ in range(LAUNCHES)])
        return _best_seconds(device, graph.replay) / LAUNCHES
    seconds = _best_seconds(device, buffer.zero_)
    return seconds if seconds < BUSY_SECONDS else device.launch_seconds


def _best_seconds(device: DeviceProfile, call: Callable[[], object]) -> float:
    return min(_seconds(device, call))


def _seconds(device: DeviceProfile, call: Callable[[], object]) -> list[float]:
    """Of each round, for so long as one rate may take."""
    once = _by_host if device.kind == "cpu" else Events()
    call()
    rounds: list[float] = []
    started = time.perf_counter()
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() - started < SECONDS:
        rounds.append(once(call))
    return rounds


def _by_host(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
