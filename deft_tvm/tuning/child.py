"""What a process does that `process.Worker` has started: its pipe, and its end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import BinaryIO


def answers_alone() -> BinaryIO:
    """Standard output, for answers; from now on what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def write_line(stream: BinaryIO, line: bytes) -> None:
    stream.write(line + b"\n")
    stream.flush()


def end_with_parent() -> None:
    """Also in the middle of a candidate that never ends; Linux only, elsewhere at the next line.

    The parent is, to Linux, the thread that started this process.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
