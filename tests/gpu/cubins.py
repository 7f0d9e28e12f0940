"""Kernels through nvcc: what ptxas says of each, and the instructions that it is made of."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock

# As TVM calls nvcc and ptxas itself.
PTXAS = "-Xptxas=-v,--register-usage-level=10,-warn-spills,-warn-lmem-usage"
FLAGS = ("-cubin", "-O3", "--use_fast_math", PTXAS)
USAGE = re.compile(
    r"Function properties for (\w+)_kernel\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)
SECTION = re.compile(r"^\.text\.(\w+)_kernel:$", re.M)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)")
ENTRY = re.compile(r"\.entry (\w+)_kernel\(")


@dataclass(frozen=True)
class Usage:
    """What one thread of a kernel takes: registers, and bytes of local memory."""

    registers: int
    stack: int
    spilled: int


@dataclass(frozen=True)
class Cubin:
    """A compiled module; kernels are known by their symbols.

    Attributes:
        folder: where its files are: the cubin, its PTX and what ptxas said.
    """

    folder: Path

    @cached_property
    def usage(self) -> Mapping[str, Usage]:
        """What ptxas reports."""
        found = USAGE.findall((self.folder / "report.txt").read_text())
        return {
            name: Usage(int(registers), int(stack), int(stores) + int(loads))
            for name, stack, stores, loads, registers in found
        }

    @cached_property
    def instructions(self) -> Mapping[str, Counter[str]]:
        """How often each instruction of the GPU stands in a kernel, as nvdisasm writes it."""
        command = [disassembler(), "-c", self.folder / "kernels.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: Counter(INSTRUCTION.findall(body)) for name, body in _parts(SECTION, text)}

    @cached_property
    def ptx(self) -> Mapping[str, str]:
        """The text of each kernel's PTX."""
        return dict(_parts(ENTRY, (self.folder / "kernels.ptx").read_text()))


def compiled(source: str, arch: str, folder: Path) -> Cubin:
    """`source` compiled for `arch`, once in all processes that share `folder`."""
    name = hashlib.sha256(" ".join([arch, source]).encode()).hexdigest()[:16]
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    report = place / "report.txt"
    with FileLock(place / "lock"):
        if not report.exists():
            text, target = place / "kernels.cu", place / "kernels.cubin"
            text.write_text(source)
            keep = ("--keep", "--keep-dir", place)
            command = ["nvcc", *FLAGS, f"-arch={arch}", *keep, text, "-o", target]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            report.write_text(done.stderr)
    return Cubin(place)


def disassembler() -> str | None:
    """nvdisasm of a CUDA toolkit, or of the Python package ``nvidia-cuda-nvdisasm``."""
    package = importlib.util.find_spec("nvidia")
    folders = () if package is None else package.submodule_search_locations or ()
    packaged = (str(path) for folder in folders for path in Path(folder).glob("cu*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(
        (path for path in packaged if os.access(path, os.X_OK)), None
    )


def _parts(begin: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """The names that `begin` finds, each with the text up to the next one."""
    found = list(begin.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    for match, end in zip(found, ends, strict=True):
        yield match[1], text[match.end() : end]
