"""Every environment variable that deft_tvm reads, as one table.

A variable is read when it is asked for, so that a test or a notebook may set it at any time before
what it is about is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from deft_tvm.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Variable(Generic[T]):
    """One environment variable: its name, what it does, its default, and how its text is read."""

    name: str
    meaning: str
    default: T
    expected: str
    parse: Callable[[str], T]

    def get(self) -> T:
        """The value now; the default where the variable is unset or empty.

        Raises:
            InputError: the text is not what the variable expects.
        """
        text = os.environ.get(self.name, "")
        if not text:
            return self.default
        try:
            return self.parse(text)
        except (ValueError, KeyError, RuntimeError):  # the last is of a home that nobody has
            raise InputError(f"{self.name} is {text!r}; expected {self.expected}") from None


def _level(text: str) -> int:
    return range(6).index(int(text))


def _flag(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)


def _path(text: str) -> Path | None:
    return Path(text).expanduser()


DEBUG = Variable(
    "DEFT_TVM_DEBUG",
    "say on stderr 1 the log entry or default taken; 2 items, bytes, µs and GB/s; "
    "3 decision and schedule; 4 CUDA or assembly; 5 TIR before and after",
    0,
    "a level from 0 to 5",
    _level,
)
DUMP: Variable[Path | None] = Variable(
    "DEFT_TVM_DUMP",
    "write all that DEBUG could say into this folder, as numbered files",
    None,
    "a folder",
    _path,
)
CHECK = Variable("DEFT_TVM_CHECK", "compare each run with the oracle", False, "0 or 1", _flag)
LOGS: Variable[Path | None] = Variable(
    "DEFT_TVM_LOGS", "read tuning logs from this folder first", None, "a folder", _path
)
UNTUNED = Variable(
    "DEFT_TVM_UNTUNED", "take default decisions, whatever was tuned", False, "0 or 1", _flag
)
MODULE_PATH: Variable[tuple[Path, ...]] = Variable(
    "DEFT_TVM_MODULE_PATH", "look for modules in these folders first", (), "folders", _paths
)

VARIABLES: tuple[Variable[Any], ...] = (DEBUG, DUMP, CHECK, LOGS, UNTUNED, MODULE_PATH)
