"""Decisions for devices that have no log: data that ships, by kernel and instruction set.

``logs/default-llvm/decisions.json`` is a list; the first entry that fits a kernel on a device is
taken. What it does not name, and a kernel that no entry fits, is left to the schedule's own
defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import msgspec

from deft_tvm.errors import LogError
from deft_tvm.files import from_json
from deft_tvm.schedules import KernelTask, schedule
from deft_tvm.tuning.log import log_roots

DECISIONS = "decisions.json"


class Default(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry.

    Attributes:
        kernels: patterns of kernel names, ``r*f32`` for all tile classes with float32 operands.
        features: what the device must have.
        decision: choices by name.
        source: where it was found: device, date, time.
    """

    kernels: tuple[str, ...]
    decision: dict[str, int]
    features: tuple[str, ...] = ()
    source: str = ""


def default_for(task: KernelTask) -> dict[str, int]:
    """The default decision of `task`, as far as its schedule has such candidates.

    Raises:
        LogError: the file of defaults cannot be read.
    """
    found = default_decision(task.name, task.kind, task.features)
    table = schedule(task)[1].table if found else {}
    return {name: value for name, value in found.items() if value in table.get(name, ())}


def default_decision(kernel: str, kind: str, features: Iterable[str]) -> dict[str, int]:
    """The decision to start from; empty where the schedule's own defaults are all there is.

    Args:
        kernel: ``TileShape.name``, or ``merge``.
        kind: ``llvm`` or ``cuda``.
        features: instruction sets, as in `DeviceProfile.features`.

    Raises:
        LogError: the file of defaults cannot be read.
    """
    have = set(features)
    files = (root / f"default-{kind}" / DECISIONS for root in log_roots())
    entries = next((_read(file) for file in files if file.is_file()), ())
    for entry in entries:
        named = any(fnmatch(kernel, pattern) for pattern in entry.kernels)
        if named and have.issuperset(entry.features):
            return dict(entry.decision)
    return {}


@cache
def _read(path: Path) -> tuple[Default, ...]:
    try:
        return from_json(path.read_bytes(), tuple[Default, ...])
    except msgspec.MsgspecError as error:
        raise LogError(f"{path} is no list of default decisions: {error}") from None
