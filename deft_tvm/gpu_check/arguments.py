"""The options that stages have."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from deft_tvm import env
from deft_tvm.device import Kind

MINUTES = 9.0


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """``--device``, cuda or cpu, and of stages that go on where they were what these need.

    Args:
        doc: what the stage does.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="folder of what was found; by default none")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to stop by itself")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--go-on", action="store_true", help="leave out what failed before, too")
    return parser


def kind_of(asked: argparse.Namespace) -> Kind:
    """Of the device."""
    return cast(Kind, asked.device)


def file_in(asked: argparse.Namespace, name: str) -> Path | None:
    """A file of the stage's folder, which is made; None where there is none."""
    if asked.out is None:
        return None
    folder = cast(Path, asked.out)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


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
