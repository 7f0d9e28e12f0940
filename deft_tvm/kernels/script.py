"""Text of kernels as TVM's parser reads it, without what takes TVM longer than reading.

For each function TVM looks up the source lines of every caller, imports and tests included, finds
and reads the function's text two times over, and notes of each expression in which place it stood.
Without that a partial kernel of 0.70 s takes 0.39 (AMD EPYC Zen 1, 2026-11-29), and a module has
up to eight of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from tvm import IRModule, tirx
from tvm.s_tir.analysis import verify_well_formed
from tvm.script.ir_builder import IRBuilder
from tvm.script.parser._core import doc, utils
from tvm.script.parser.core.diagnostics import Source
from tvm.script.parser.core.error import ParserError
from tvm.script.parser.core.parser import Parser


def prim_func(*, s_tir: bool) -> Callable[[Callable[..., None]], tirx.PrimFunc]:
    """What ``T.prim_func`` is, for functions whose annotations name nothing local.

    Args:
        s_tir: the parser takes it, and the name, from the text ``@script.prim_func(s_tir=True)``.
    """
    assert s_tir

    def parsed(function: Callable[..., None]) -> tirx.PrimFunc:
        annotations = {function.__name__: function.__annotations__}
        parser = _Parser(text_of(function), annotations)
        with IRBuilder() as builder:
            try:
                parser.parse(utils.inspect_function_capture(function))
            except ParserError as error:
                parser.report_error(error.node, error.args[0])
        made = builder.get()
        verify_well_formed(IRModule.from_expr(made))
        return made

    parsed.dispatch_token = "tirx"  # type: ignore[attr-defined]  # as the parser finds out
    return parsed


def text_of(function: Callable[..., None]) -> Source:
    """The text of a function, found and read once for all that are made of it."""
    place = function.__code__.co_filename, function.__code__.co_firstlineno
    if place not in _texts:
        _texts[place] = _Text(function)
    return _texts[place]


class _Text(Source):
    """Is read once: nothing that visits it changes it."""

    def as_ast(self) -> doc.AST:
        return self._read

    @cached_property
    def _read(self) -> doc.AST:
        return super().as_ast()


class _Parser(Parser):
    """Leaves out of TensorIR where in the text it comes from."""

    def with_source_span(self, _node: doc.AST) -> AbstractContextManager[None]:
        return _NOTHING

    def annotate_current_source_span(self, value: Any) -> Any:
        return value


_NOTHING: AbstractContextManager[None] = nullcontext()
_texts: dict[tuple[str, int], Source] = {}
