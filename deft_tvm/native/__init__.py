"""What every module brings along beside its kernels, in C, and the compiler that it takes.

torch_pool.c  lets a CPU's kernels run on torch's own threads, see `deft_tvm.threads`
planner/      makes the plans of decoding, see `deft_tvm.plan.compiled`
run.c         runs the kernels by a plan in one buffer, see `deft_tvm.pytorch.ops`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tvm_ffi import libinfo

from deft_tvm.errors import CompilerMissing

# No product may be fused into a sum: what is planned would depend on the compiler.
_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")

_HERE = Path(__file__).parent
TORCH_POOL = (_HERE / "torch_pool.c",)
PLANNER = tuple(sorted(_HERE.glob("planner/*.c")))
RUN = (_HERE / "run.c",)


def compile_c(
    sources: Sequence[Path], directory: str | os.PathLike[str], cc: str | None = None
) -> list[str]:
    """Compile C sources; the object files' paths, for ``export_library(..., addons=...)``.

    Args:
        sources: files with different names.
        directory: where the object files are written.
        cc: a C compiler, by default ``$CC``, ``cc``, ``gcc`` or ``clang``; a cross compiler for a
            module of another processor.

    Raises:
        CompilerMissing: there is no C compiler, or it fails.
    """
    objects = _objects(cc or _c_compiler(), tuple(sources))
    for name, content in objects.items():
        Path(directory, name).write_bytes(content)
    return [os.path.join(directory, name) for name in objects]


@cache
def _objects(cc: str, sources: tuple[Path, ...]) -> dict[str, bytes]:
    """The object file of each source by its name: every module of a process has the same."""
    folders = (f"-I{folder}" for folder in libinfo.include_paths())
    command = [cc, *_FLAGS, *folders, "-c", *map(str, sources)]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=scratch)
        except FileNotFoundError:
            raise CompilerMissing(f"cc is {cc!r}; expected a C compiler") from None
        except subprocess.CalledProcessError as error:
            raise CompilerMissing(f"{' '.join(command)} failed: {error.stderr.strip()}") from None
        names = [f"{source.stem}.o" for source in sources]
        return {name: Path(scratch, name).read_bytes() for name in names}


def _c_compiler() -> str:
    names = filter(None, (os.environ.get("CC"), "cc", "gcc", "clang"))
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise CompilerMissing(
            "no C compiler (cc, gcc, clang) is on PATH; expected one (`apt install gcc`), or its "
            "name in CC"
        )
    return found
