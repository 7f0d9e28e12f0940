"""The commands of ``deft-tvm``: parse, run, and end with one of a few exit codes.

Exit codes: 0 done, 1 a check failed or one of several modules could not be built, 2 wrong use, or
something that is refused with a reason (by deft_tvm, or by the system: a file, a folder), 70 a
fault of deft_tvm, with its traceback, 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from deft_tvm.errors import DeftError, installing
from deft_tvm.exit_codes import FAULT, INTERRUPTED, WRONG_USE
from deft_tvm.interruption import watched


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, by default that of this process; always ends in SystemExit."""
    end_with_code(partial(_run, arguments))


def end_with_code(command: Callable[[], object]) -> None:
    """Run a command to its end, and tell what was refused; always ends in SystemExit."""
    _print_anywhere()
    try:
        with watched():
            command()
        raise SystemExit(0)
    except DeftError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception:  # Python would exit with 1, which says that a check failed
        traceback.print_exc()
        raise SystemExit(FAULT) from None


def _print_anywhere() -> None:
    """Print ``?`` for what the encoding of standard output has no sign for, as ASCII for ``×``."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        try:
            "×├".encode(out.encoding, out.errors or "strict")
        except UnicodeEncodeError:
            out.reconfigure(errors="replace")


def _run(arguments: Sequence[str] | None) -> None:
    try:
        from deft_tvm.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        _refuse(f"{error.name} is not installed; run {installing('cli')}")
    app(args=arguments, prog_name="deft-tvm")


def _refuse(sentence: str) -> None:
    print(f"deft-tvm: {sentence}", file=sys.stderr)
    raise SystemExit(WRONG_USE)
