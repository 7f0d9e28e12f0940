"""The command line: ``deft-tvm tune · build · check · bench · info · show``.

Exit codes: 0 done, 1 a check failed, 2 wrong use, or something that is refused with a reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deft_tvm.errors import DeftError

WRONG_USE = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, by default that of this process; always ends in SystemExit."""
    try:
        from deft_tvm.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        _refuse(f"{error.name} is not installed; run `pip install 'deft-tvm[cli]'`")
    try:
        app(args=arguments, prog_name="deft-tvm")
    except DeftError as error:
        _refuse(str(error))


def _refuse(sentence: str) -> None:
    print(f"deft-tvm: {sentence}", file=sys.stderr)
    raise SystemExit(WRONG_USE)
