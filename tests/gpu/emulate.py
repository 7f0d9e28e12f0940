"""Generated CUDA run on the CPU: the source is compiled as C++17 with ``emulation/emulate.h``."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from ptx import without_inline_ptx

HEADERS = Path(__file__).parent / "emulation"
FLAGS = (
    "-std=c++17",
    "-fno-strict-aliasing",
    "-march=native",
    "-w",
    # Its check of longjmp knows one stack only.
    "-U_FORTIFY_SOURCE",
    f"-I{HEADERS}",
)
# Registers that nothing was written to hold what is neither 0 nor small.
RUN_FLAGS = ("-O1", "-shared", "-fPIC", "-ftrivial-auto-var-init=pattern")
APART_FLAGS = ("-O1",)
# Copies of memory are calls, which the sanitizer sees.
RACE_FLAGS = ("-O1", "-g", "-fsanitize=thread", "-fno-builtin")
WARNING = "WARNING: ThreadSanitizer: data race"

PRELUDE_END = "#define ushort unsigned short\n#endif\n"
KERNEL = 'extern "C" __global__'
SIGNATURE = KERNEL + r" void __launch_bounds__\((\d+), \d+\) {}_kernel\(([^)]*)\) {{"
DYNAMIC_SHARED = re.compile(r"extern __shared__ .*? buf_dyn_shmem_ptr\[\];")
WAITING_FUNCTION = re.compile(
    r"^__device__ [^\n;]*\b(deft_\w+)\([^)]*\) {[^}]*cp\.async\.wait", re.M
)
WAIT_CALL = re.compile(r"\bptx_cp_async_wait_(group|all)\(")
ARRAY_OF_SHARED = re.compile(r"__shared__ (alignas\(\d+\))")
LAUNCH = """
extern "C" const char* launch(int blocks, int reversed, long skipped{declarations}) {{
  skipped_statements = skipped;
  return run_blocks(blocks, {threads}, reversed, [=] {{
    forget_copies();
    {symbol}_kernel({names});
  }});
}}
"""
# What lies around an argument is as shared memory is at first, so that an index out of it leads to
# something, and what is read there shows.
MAIN = """
#include <fstream>
constexpr size_t AROUND = 1 << 18;
static std::vector<std::vector<char>> loaded;
UNSEEN static void* load(const char* path) {{
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes(AROUND, POISON);
  bytes.insert(bytes.end(), std::istreambuf_iterator<char>(file), {{}});
  bytes.resize(bytes.size() + AROUND, POISON);
  loaded.push_back(std::move(bytes));
  return loaded.back().data() + AROUND;
}}
UNSEEN static uint64_t digest(const std::vector<char>& bytes) {{
  uint64_t found = 14695981039346656037u;
  const char* begin = bytes.data();
  for (size_t i = 0, n = bytes.size(); i < n; ++i) found = (found ^ begin[i]) * 1099511628211u;
  return found;
}}
int main(int count, char** words) {{
  const char* failure = launch({blocks}, atoi(words[1]), atol(words[2]){arguments});
  for (const auto& bytes : loaded) printf("%016lx", digest(bytes));
  printf(" %s", failure ? failure : "");
}}
"""
Arguments = Mapping[str, "torch.Tensor | int"]


class EmulationError(Exception):
    """What a GPU would hang at, or does not define."""


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel, under the name that the computation gave it."""

    ctype: str
    symbol: str

    @property
    def is_pointer(self) -> bool:
        return self.ctype.endswith("*")

    @property
    def name(self) -> str:
        return self.symbol.removesuffix("_ptr") if self.is_pointer else self.symbol


@dataclass(frozen=True)
class Outcome:
    """What came of a run in a process of its own.

    Attributes:
        races: how many data races ThreadSanitizer saw.
        results: a digest of all arguments after it; empty if it came to no end.
        failure: what a GPU would hang at, or does not define; empty if there is nothing.
    """

    races: int
    results: str
    failure: str


@dataclass(frozen=True)
class Kernel:
    """A CUDA kernel as C++.

    Attributes:
        parameters: in the order in which it takes them.
        cpp: the text, with an entry ``launch(blocks, reversed, skipped, ...)``.
        barriers: how many ``__syncthreads()`` stand in the text.
        waits: how many waits for asynchronous copies stand in it.
    """

    parameters: tuple[Parameter, ...]
    cpp: str
    barriers: int
    waits: int

    def run(
        self,
        folder: Path,
        blocks: int,
        arguments: Arguments,
        last_first: bool = False,
        skipped: Collection[int] = (),
    ) -> None:
        """Compile and run `blocks` blocks in this process; arguments are found by name.

        Args:
            folder: where compilations go.
            blocks: how many there are.
            arguments: tensors and sizes; results are written in place.
            last_first: threads of high numbers run first, up to the next barrier.
            skipped: numbers of barriers that are not there, or after them all of waits.

        Raises:
            EmulationError: threads that cannot go on, a misaligned copy.
        """
        values = [_value(parameter, arguments) for parameter in self.parameters]
        library = _library(_compiled(folder, self.cpp, RUN_FLAGS))
        options = map(ctypes.c_int64, _options(last_first, skipped))
        failure = library.launch(blocks, *options, *values)
        if failure:
            raise EmulationError(failure.decode())

    def apart(
        self,
        folder: Path,
        blocks: int,
        arguments: Arguments,
        last_first: bool = False,
        skipped: Collection[int] = (),
        watched: bool = True,
    ) -> Outcome:
        """The same run in a process of its own, `watched` by ThreadSanitizer."""
        call = "".join(f", {_literal(p, arguments, folder)}" for p in self.parameters)
        main = MAIN.format(blocks=blocks, arguments=call)
        program = _compiled(folder, self.cpp + main, RACE_FLAGS if watched else APART_FLAGS)
        environment = os.environ | {"TSAN_OPTIONS": "exitcode=0 atexit_sleep_ms=0"}
        launcher = sanitizer() if watched else None
        command = [*(launcher or ()), program, *map(str, _options(last_first, skipped))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        results, _, failure = done.stdout.partition(" ")
        return Outcome(done.stderr.count(WARNING), results, failure if results else done.stderr)

    def waiting_for_less(self) -> Kernel:
        """The kernel whose waits leave one more group of copies under way."""
        return replace(self, cpp=WAIT_CALL.sub(r"ptx_cp_async_wait_\1_but_one(", self.cpp))


def translate(source: str, symbol: str) -> Kernel:
    """The kernel ``<symbol>_kernel`` of CUDA `source`."""
    found = re.search(SIGNATURE.format(symbol), source, re.S)
    assert found is not None, f"no kernel {symbol}_kernel"
    if "threadIdx.z" in source:
        raise NotImplementedError("a kernel with threadIdx.z; emulation/threads.h has x and y")
    threads, listed = int(found[1]), found[2].split(",")
    parameters = tuple(_parameter(text) for text in listed)
    functions = source[source.index(PRELUDE_END) + len(PRELUDE_END) : source.index(KERNEL)]
    body = source[source.rindex(found[0]) :]
    end = body.index("\n}\n") + 3
    launch = LAUNCH.format(
        declarations="".join(f", {p.ctype} {p.symbol}" for p in parameters),
        names=", ".join(p.symbol for p in parameters),
        threads=threads,
        symbol=symbol,
    )
    kernel = ARRAY_OF_SHARED.sub(r"\1 static STATIC_SHARED", DYNAMIC_SHARED.sub("", body[:end]))
    kernel, barriers = _skippable(kernel, r"__syncthreads\(\);", 0)
    waiting = "|".join(WAITING_FUNCTION.findall(functions)) or "(?!)"
    kernel, waits = _skippable(kernel, rf"\b(?:{waiting})\([^;]*\);", barriers)
    assert barriers + waits < 64, "as many as skipped_statements has bits"
    text = without_inline_ptx(functions + kernel)
    return Kernel(parameters, f'#include "emulate.h"\n{text}{launch}', barriers, waits)


@cache
def sanitizer() -> tuple[str, ...] | None:
    """By what a program with ThreadSanitizer is started here; None where it does not run.

    It wants its shadow memory at fixed addresses, which some kernels give to something else unless
    they are asked not to.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "nothing.cpp"
        source.write_text("int main() {}\n")
        program = source.with_suffix("")
        build = subprocess.run(["g++", "-fsanitize=thread", source, "-o", program])
        if build.returncode:
            return None
        launchers = ((), ("setarch", "-R"))
        return next((way for way in launchers if _runs([*way, program])), None)


def _runs(command: list[Any]) -> bool:
    available = shutil.which(command[0]) is not None
    return available and not subprocess.run(command, capture_output=True).returncode


def _skippable(text: str, statement: str, first: int) -> tuple[str, int]:
    """`text` where each such statement can be skipped by its number, and how many there are."""
    numbers = count(first)

    def skippable(found: re.Match[str]) -> str:
        return f"if (!(skipped_statements >> {next(numbers)} & 1)) {found[0]}"

    return re.subn(statement, skippable, text)


def _options(last_first: bool, skipped: Collection[int]) -> tuple[int, int]:
    """The numbers that ``launch`` takes before the kernel's arguments."""
    return int(last_first), sum(1 << number for number in skipped)


def _parameter(text: str) -> Parameter:
    *ctype, symbol = text.replace("__restrict__", "").replace("*", "* ").split()
    return Parameter(" ".join(ctype), symbol)


def _compiled(folder: Path, cpp: str, flags: tuple[str, ...]) -> Path:
    """The compiled text, which is compiled once."""
    name = hashlib.sha256("".join([cpp, *flags]).encode()).hexdigest()[:16]
    source, target = folder / f"{name}.cpp", folder / f"{name}.out"
    if not target.exists():
        source.write_text(cpp)
        read = f"-I{_headers(flags)}"
        subprocess.run(["g++", read, *FLAGS, *flags, source, "-o", target], check=True)
    return target


@cache
def _headers(flags: tuple[str, ...]) -> Path:
    """Where g++ finds the headers as it has compiled them for `flags`; reading them takes a third
    of a kernel's compilation."""
    folder = Path(tempfile.mkdtemp(dir=_folder.name))
    header = HEADERS / "emulate.h"
    command = ["g++", *FLAGS, *flags, "-x", "c++-header", header, "-o", folder / "emulate.h.gch"]
    subprocess.run(command, check=True)
    return folder


_folder = tempfile.TemporaryDirectory(prefix="deft-tvm-headers-")


def _library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.launch.restype = ctypes.c_char_p
    return library


def _value(parameter: Parameter, arguments: Arguments) -> ctypes.c_void_p | ctypes.c_int64:
    value = arguments[parameter.name]
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value)


def _literal(parameter: Parameter, arguments: Arguments, folder: Path) -> str:
    value = arguments[parameter.name]
    if isinstance(value, int):
        return str(value)
    path = folder / f"{parameter.name}.bin"
    path.write_bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
    return f'({parameter.ctype})load("{path}")'
