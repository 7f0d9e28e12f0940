"""A small exported CPU module with parallel loops, workspaces and an error; needs the compiler."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm.script import tirx as T

from deft_tvm.native import TORCH_POOL, compile_c


@T.prim_func(s_tir=True)
def doubled(a: T.handle, b: T.handle) -> None:
    """b = 2 a; each row is written 256 times into a workspace of 64 KiB and read back once."""
    n = T.int32()
    A = T.match_buffer(a, (n, 64), "float32")
    B = T.match_buffer(b, (n, 64), "float32")
    for i in T.parallel(n):
        with T.sblock("row"):
            W = T.sblock_alloc_buffer((256, 64), "float32", scope="local")
            for k, j in T.grid(256, 64):
                W[k, j] = A[i, j] * T.float32(2)
            for j in T.serial(64):
                B[i, j] = W[(i * 7) % 256, j]


@T.prim_func(s_tir=True)
def counted(a: T.handle) -> None:
    """a += 1 for each element; an error where one is negative."""
    n = T.int32()
    A = T.match_buffer(a, (n,), "int32")
    for i in T.parallel(n):
        assert A[i] >= 0, "negative element"
        A[i] = A[i] + 1


def export(directory: Path, target: dict[str, object]) -> Path:
    """Compile both functions with the torch pool inside; the module's path."""
    functions = {"doubled": doubled, "counted": counted}
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    executable = tvm.compile(tvm.IRModule(named), target=tvm.target.Target(target))
    path = directory / "module.so"
    executable.export_library(str(path), addons=compile_c(TORCH_POOL, directory))
    return path
