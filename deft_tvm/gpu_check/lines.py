"""What a stage has found so far: a file of JSON objects, a line each, on the disk at once."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import msgspec

from deft_tvm.device import gpu_error
from deft_tvm.files import append_line, from_json

Line = TypeVar("Line")


class Lines(Generic[Line]):
    """A file of lines; one that cannot be read counts as none.

    Args:
        path: of the file; None: nothing is kept.
        kind: the type of a line, a struct of `msgspec` or a union of them.
        again: forget what is in it.

    Attributes:
        found: all lines, in order.
    """

    def __init__(self, path: Path | None, kind: Any, again: bool = False) -> None:
        self.path = path
        if again and path is not None:
            path.unlink(missing_ok=True)
        self.found: list[Line] = [] if path is None else _read(path, kind)

    def add(self, line: Line) -> Line:
        """Append a line; it is on the disk when this returns it."""
        self.found.append(line)
        if self.path is not None:
            append_line(self.path, msgspec.json.encode(line) + b"\n")
        return line


def _read(path: Path, kind: Any) -> list[Any]:
    found = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found.append(from_json(text, kind))
        except msgspec.MsgspecError:
            continue
    return found


def last_line(error: BaseException) -> str:
    """Of an exception's text, with its type: what a table has room for."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def start_again(asked: Namespace, seconds: float, options: Sequence[str] = ()) -> NoReturn:
    """Go on in a new process, which takes this one's place, after the lines that there are.

    Args:
        asked: what this process was asked for.
        seconds: that are left.
        options: of the stage alone, as they were given.
    """
    module = sys.modules["__main__"].__spec__
    assert module is not None, "stages are run by `python -m`"
    command = ["-m", module.name, "--device", asked.device, "--out", str(asked.out), "--go-on"]
    command += ["--minutes", f"{max(0.0, seconds) / 60:.3f}", *options]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-u", *command])


def go_on_elsewhere(
    asked: Namespace, left: Callable[[], float], options: Sequence[str] = ()
) -> None:
    """`start_again` if the GPU refuses this process, and there is a file to go on from."""
    if (error := gpu_error()) and asked.out is not None:
        print(f"a new process goes on: {error.splitlines()[0]}", flush=True)
        start_again(asked, left(), options)
