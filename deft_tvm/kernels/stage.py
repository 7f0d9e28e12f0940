"""What a stage is: a piece of TensorIR that the partial kernel puts in its place.

Blocks are named by what they compute: schedules address them by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from types import FrameType
from typing import Any

from tvm.script.parser._core import utils
from tvm.tirx.script.parser.entry import TIRInline

from deft_tvm.kernels.script import text_of


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """TensorIR that is parsed where it is called, as ``T.inline`` does.

    ``T.inline`` numbers block names by its calls, over all kernels of the process; these keep
    their names.
    """

    @cache
    def piece() -> _Stage:
        # At the first call, when all that it names is defined.
        return _Stage(text_of(function), utils.inspect_function_capture(function), function)

    @wraps(function)
    def placed(*args: Any) -> None:
        piece().call_count = 0
        piece()(*args)

    return placed


class _Stage(TIRInline):
    """TVM's inline function without what takes longer than all other parsing.

    TVM looks up the source lines of every caller, imports and tests included, to find its parser
    among their globals.
    """

    def _find_parser_def(self) -> Any:
        caller: FrameType | None = sys._getframe()
        while caller is not None:
            parser = caller.f_globals.get(self.parser_object_name)
            if parser is not None:
                return parser
            caller = caller.f_back
        raise RuntimeError(f"{self.func.__name__} is called outside of a kernel's text")
