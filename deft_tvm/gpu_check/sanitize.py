"""``python -m deft_tvm.gpu_check.sanitize``: all kernels under NVIDIA's compute-sanitizer.

*memcheck* finds accesses out of bounds or misaligned, *racecheck* hazards in shared memory,
*synccheck* barriers that not all threads reach, *initcheck* reads of memory that nobody has
written. A line for each tool and attention; several run at once, since nothing is timed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal

import msgspec

from deft_tvm.cli import end_with_code
from deft_tvm.gpu_check.arguments import deadline, file_in, kind_of, only, parser_of
from deft_tvm.gpu_check.cells import DIFFERENT
from deft_tvm.gpu_check.lines import Lines
from deft_tvm.gpu_check.modules import build_missing
from deft_tvm.gpu_check.runner import run_aside
from deft_tvm.spec import AttentionSpec

FILE = "sanitize.jsonl"
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
AT_ONCE = 12
SECONDS = 240.0
"""For one tool and attention."""
FOUND = 99
"""Exit code by which the sanitizer says that it found something."""
MODULE = "deft_tvm.gpu_check.sanitized"
LINES = 12

Verdict = Literal["clean", "found", "failed", "timeout", "missing"]


class Sanitized(msgspec.Struct, frozen=True):
    """What a tool said of an attention's kernels.

    Attributes:
        tool: which.
        spec: the attention.
        verdict: ``found``: errors; ``failed``: it could not run.
        said: the beginning of what it printed.
    """

    tool: str
    spec: str
    verdict: Verdict
    said: str = ""


def main(specs: Sequence[str] | None = None) -> None:
    """Every tool on every attention."""
    parser = parser_of(__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help="with commas between")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--only", default="", help="attentions with this in their name")
    asked = parser.parse_args()
    left = deadline(asked)
    lines: Lines[Sanitized] = Lines(file_in(asked, FILE), Sanitized, asked.again)
    names = dict.fromkeys(str(AttentionSpec.parse(spec)) for spec in specs or DIFFERENT)
    wanted = [(tool, name) for tool in asked.tools.split(",") for name in only(asked, names)]
    last = {(line.tool, line.spec): line for line in lines.found}
    todo = [
        key
        for key in wanted
        if key not in last or not (asked.go_on or last[key].verdict == "clean")
    ]
    program = sanitizer()
    if program is None:
        why = f"{SANITIZER} is neither on PATH nor in {' or '.join(PLACES)}; expected CUDA's"
        print(f"missing: {why}", flush=True)
        lines.add(Sanitized("", "", "missing", why))
        sys.exit(1)
    build_missing((name for _, name in todo), kind_of(asked))
    with ThreadPoolExecutor(asked.at_once) as pool:
        futures = [
            pool.submit(sanitize, program, tool, name, asked.device, left) for tool, name in todo
        ]
        for future in as_completed(futures):
            if (line := future.result()) is not None:
                last[line.tool, line.spec] = lines.add(line)
                print(f"{line.verdict} {line.tool} {line.spec}\n{line.said}".rstrip(), flush=True)
    undone = sum(key not in last for key in wanted)
    unclean = sum(key in last and last[key].verdict != "clean" for key in wanted)
    print(f"{unclean} of {len(wanted)} are not clean, {undone} had no time")
    sys.exit(1 if unclean or undone else 0)


def sanitizer() -> str | None:
    """Path of the program."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *PLACES))
    return shutil.which(SANITIZER, path=path)


def sanitize(
    program: str, tool: str, spec: str, device: str, left: Callable[[], float]
) -> Sanitized | None:
    """One tool on one attention; None where there is no time for it."""
    seconds = min(SECONDS, left())
    if seconds <= 0:
        return None
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    if tool == "memcheck":  # torch asks a driver for what it may not have
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", MODULE, "--device", device, "--spec", spec]
    status, code, said = run_aside(command, seconds)
    if status == "timeout":
        return Sanitized(tool, spec, "timeout", "\n".join([f"{seconds:.0f} s", *said[-LINES:]]))
    summary = [line for line in said if "SUMMARY" in line]
    if code == 0 and summary:
        return Sanitized(tool, spec, "clean", "\n".join(summary))
    if code == FOUND:
        told = [line for line in said if line.startswith("=====")]
        return Sanitized(tool, spec, "found", "\n".join([*told[:LINES], *summary]))
    return Sanitized(tool, spec, "failed", "\n".join(said[-LINES:]))


if __name__ == "__main__":
    end_with_code(main)
