"""Generated CUDA run on the CPU: the source is compiled as C++20 with `emulate.h`.

Functions that hold inline PTX are left out of the source; `emulate.h` has one of the same name.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-fno-strict-aliasing", "-march=native", "-pthread", "-w", f"-I{HERE}")
RACE_EXIT = 66

OWN_FUNCTION = re.compile(r"^__device__ __forceinline__ [\w ]+ deft_.*?\n}\n", re.S | re.M)
SIGNATURE = r'extern "C" __global__ void __launch_bounds__\((\d+), \d+\) {}_kernel\(([^)]*)\) {{'
DYNAMIC_SHARED = re.compile(r"extern __shared__ .*? buf_dyn_shmem_ptr\[\];")
STATIC_SHARED = re.compile(r"__shared__ alignas\(\d+\)")
LAUNCH = """
extern "C" void launch(int blocks{declarations}) {{
  run_blocks(blocks, {threads}, [=] {{ {symbol}_kernel({names}); }});
}}
"""
MAIN = """
#include <fstream>
static void* load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  auto* bytes = new std::vector<char>(std::istreambuf_iterator<char>(file), {});
  bytes->resize(bytes->size() + 64);
  return bytes->data();
}
"""
Arguments = Mapping[str, "torch.Tensor | int"]


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
class Kernel:
    """A CUDA kernel as C++ with an entry ``launch(blocks, ...)``."""

    parameters: tuple[Parameter, ...]
    cpp: str

    def run(self, folder: Path, blocks: int, arguments: Arguments) -> None:
        """Compile and run `blocks` blocks in this process; arguments are found by name."""
        values = [_value(parameter, arguments) for parameter in self.parameters]
        library = ctypes.CDLL(str(_compile(folder, self.cpp, ("-O1", "-shared", "-fPIC"))))
        library.launch(blocks, *values)

    def races(self, folder: Path, blocks: int, arguments: Arguments) -> int:
        """How many data races ThreadSanitizer sees in the same run, in a process of its own."""
        call = ", ".join(_literal(p, arguments, folder) for p in self.parameters)
        main = f"{MAIN}\nint main() {{ launch({blocks}, {call}); }}\n"
        program = _compile(folder, self.cpp + main, ("-O1", "-g", "-fsanitize=thread"))
        environment = {"TSAN_OPTIONS": f"exitcode={RACE_EXIT}"}
        done = subprocess.run([program], capture_output=True, text=True, env=environment)
        assert done.returncode in (0, RACE_EXIT), done.stderr
        return done.stderr.count("WARNING: ThreadSanitizer: data race")


def translate(source: str, symbol: str) -> Kernel:
    """The kernel ``<symbol>_kernel`` of CUDA `source`."""
    found = re.search(SIGNATURE.format(symbol), source, re.S)
    assert found is not None, f"no kernel {symbol}_kernel"
    threads, listed = int(found[1]), found[2].split(",")
    parameters = tuple(_parameter(text) for text in listed)
    functions = dict.fromkeys(t for t in OWN_FUNCTION.findall(source) if "asm" not in t)
    body = source[source.rindex(found[0]) :]
    end = body.index("\n}\n") + 3
    launch = LAUNCH.format(
        declarations="".join(f", {p.ctype} {p.symbol}" for p in parameters),
        names=", ".join(p.symbol for p in parameters),
        threads=threads,
        symbol=symbol,
    )
    kernel = STATIC_SHARED.sub("alignas(64) static", DYNAMIC_SHARED.sub("", body[:end]))
    return Kernel(parameters, "\n".join(['#include "emulate.h"', *functions, kernel, launch]))


def _parameter(text: str) -> Parameter:
    *ctype, symbol = text.replace("__restrict__", "").replace("*", "* ").split()
    return Parameter(" ".join(ctype), symbol)


def _compile(folder: Path, cpp: str, flags: tuple[str, ...]) -> Path:
    source = folder / f"emulated{len(list(folder.glob('*.cpp')))}.cpp"
    source.write_text(cpp)
    target = source.with_suffix(".so" if "-shared" in flags else "")
    subprocess.run(["g++", *FLAGS, *flags, source, "-o", target], check=True)
    return target


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
