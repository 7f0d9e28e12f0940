"""Where the time of decoding goes: attention, planning, and the rest of the model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Clock:
    """Seconds by part; a part inside another counts as itself alone.

    Attributes:
        seconds: of each part, since the last start.
    """

    def __init__(self, finish: Callable[[], object] | None = None) -> None:
        """A clock that is running.

        Args:
            finish: called where a part begins and ends: waits for a GPU.
        """
        self._finish = finish or (lambda: None)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside: list[str] = []
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Count from now on."""
        self.seconds.clear()
        self._began = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the last start, whatever they went to."""
        return time.perf_counter() - self._began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside is of this part."""
        self._inside.append(name)
        self._finish()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._finish()
            took = time.perf_counter() - began
            self._inside.pop()
            self.seconds[name] += took
            if self._inside:
                self.seconds[self._inside[-1]] -= took

    def counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which is of this part."""

        @wraps(call)
        def counted(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return call(*arguments, **options)

        return counted

    @contextmanager
    def watching(self, *watched: tuple[type, str, str]) -> Iterator[None]:
        """While this lasts, methods of classes count.

        Args:
            watched: for each its class, its name, and of which part it is.
        """
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in watched]
        for (owner, name, part), (_, _, method) in zip(watched, before, strict=True):
            setattr(owner, name, self.counted(part, method))
        try:
            yield
        finally:
            for owner, name, method in before:
                setattr(owner, name, method)
