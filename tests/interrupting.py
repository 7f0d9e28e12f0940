"""A command whose process gets SIGINT where it calls a function: ``FUNCTION BECOMES ARGUMENTS…``.

BECOMES says what is made of KeyboardInterrupt there: itself, another error, or nothing. Where tests
run in the background of a shell, SIGINT is ignored, and so it would be here.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import Any

from deft_tvm.cli import main

ITSELF, ERROR, NOTHING = "itself", "error", "nothing"


def interrupt(name: str, becomes: str) -> None:
    """Let the first call of ``module:attribute`` be interrupted."""
    owner, _, attribute = name.rpartition(".")
    place = pkgutil.resolve_name(owner)
    called: Callable[..., Any] = getattr(place, attribute)

    def once(*args: Any, **options: Any) -> Any:
        setattr(place, attribute, called)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            if becomes == ITSELF:
                raise
            if becomes == ERROR:
                raise RuntimeError("interrupted") from error
        return called(*args, **options)

    setattr(place, attribute, once)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function, what, *arguments = sys.argv[1:]
    if function:
        interrupt(function, what)
    main(arguments)
