"""Ctrl-C stays an interruption, whatever is made of it on its way out of a command.

What cleans up or imports something just then may end in another error, and a finalizer loses it.
So the signal itself is noted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted = False


@contextmanager
def watched() -> Iterator[None]:
    """Note each SIGINT in the body, and raise KeyboardInterrupt as Python does; see `kept`.

    Does so in the main thread alone, which gets signals, and not where they are ignored, as in a
    shell's background jobs, or handled otherwise.

    Raises:
        KeyboardInterrupt: as `kept`.
    """
    global _noted
    _noted = False
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, _note)
    try:
        with kept():
            yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def kept() -> Iterator[None]:
    """Part of what is `watched`: after Ctrl-C it ends in nothing but KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: there was one, and the body went on or ended in another error.
    """
    try:
        yield
    except Exception:
        if _noted:
            raise KeyboardInterrupt from None
        raise
    if _noted:
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = True
    signal.default_int_handler(number, frame)
