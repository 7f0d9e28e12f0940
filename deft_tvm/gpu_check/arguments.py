"""The options that stages have."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar, cast

from deft_tvm import env
from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.errors import InputError
from deft_tvm.gpu_check.folder import folder_of

T = TypeVar("T")

MINUTES = 9.0


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """``--device``, cuda or cpu, and of stages that go on where they were what these need.

    Args:
        doc: what the stage does.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of what was found; by default none")
    parser.add_argument("--minutes", type=number, default=MINUTES, help="when to stop by itself")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--go-on", action="store_true", help="leave out what failed before, too")
    return parser


def number(text: str) -> float:
    """Of an option; `float` alone reads ``nan`` and ``inf``, too.

    Raises:
        ValueError: it is none, or not finite.
    """
    if not math.isfinite(found := float(text)):
        raise ValueError(text)
    return found


def kind_of(asked: argparse.Namespace) -> Kind:
    """Of the device."""
    return cast(Kind, asked.device)


def file_in(asked: argparse.Namespace, name: str) -> Path | None:
    """A file of the stage's folder, which is made; None where there is none.

    Raises:
        InputError: the folder is another device's.
    """
    if asked.out is None:
        return None
    return folder_of(DeviceProfile.detect(kind_of(asked)), asked.out) / name


def only(asked: argparse.Namespace, cells: Iterable[T], name: Callable[[T], str] = str) -> list[T]:
    """Cells with ``--only`` in their name.

    Raises:
        InputError: there are none, so that nothing would be found, and nothing be wrong.
    """
    found = [cell for cell in cells if asked.only in name(cell)]
    if not found:
        raise InputError(f"--only is {asked.only!r}; expected a part of the name of a cell")
    return found


def use_logs(asked: argparse.Namespace) -> Path | None:
    """Plan and build by the logs in the stage's folder, unless the environment names others.

    Returns:
        That folder; None where there is none.
    """
    if asked.out is None:
        return None
    folder = cast(Path, asked.out).absolute() / "logs"
    os.environ.setdefault(env.LOGS.name, str(folder))
    return folder


def deadline(asked: argparse.Namespace) -> Callable[[], float]:
    """Seconds that are left of ``--minutes``, counted from now."""
    end = time.monotonic() + 60 * asked.minutes
    return lambda: end - time.monotonic()
