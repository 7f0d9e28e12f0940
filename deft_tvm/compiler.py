"""The C compiler, for the sources that a module brings along beside its kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deft_tvm.errors import CompilerMissing

# No product may be fused into a sum: what is planned would depend on the compiler.
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")


def compile_c(
    sources: Sequence[Path],
    directory: str | os.PathLike[str],
    cc: str | None = None,
    include: Sequence[str] = (),
) -> list[str]:
    """Compile C sources; the object files' paths, for ``export_library(..., addons=...)``.

    Args:
        sources: files with different names.
        directory: where the object files are written.
        cc: a C compiler, by default ``$CC``, ``cc``, ``gcc`` or ``clang``; a cross compiler for a
            module of another processor.
        include: folders of headers.

    Raises:
        CompilerMissing: there is no C compiler, or it fails.
    """
    folders = (f"-I{folder}" for folder in include)
    command = [cc or _c_compiler(), *_FLAGS, *folders, "-c", *map(str, sources)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory)
    except FileNotFoundError:
        raise CompilerMissing(f"cc is {command[0]!r}; expected a C compiler") from None
    except subprocess.CalledProcessError as error:
        raise CompilerMissing(f"{' '.join(command)} failed: {error.stderr.strip()}") from None
    return [os.path.join(directory, f"{source.stem}.o") for source in sources]


def _c_compiler() -> str:
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise CompilerMissing("no C compiler (cc, gcc, clang) on PATH; expected one, or its name")
    return found
