"""``python -m deft_tvm.gpu_check.modules``: the modules that stages need, built many at once.

TVM lowers and compiles a module on one core, in 5 to 15 seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.finding import candidates
from deft_tvm.gpu_check.arguments import kind_of, parser_of
from deft_tvm.gpu_check.cells import CELLS, SPEEDS
from deft_tvm.gpu_check.lines import last_line
from deft_tvm.spec import AttentionSpec

MOST = 16
"""Processes, of a gigabyte each: a container may have fewer cores than it sees."""


def main() -> None:
    """Build what exact, sanitize and bench need; a line each."""
    asked = parser_of(__doc__).parse_args()
    failed = build_missing((*SPEEDS, *(cell.spec for cell in CELLS)), kind_of(asked))
    sys.exit(1 if failed else 0)


def build_missing(specs: Iterable[str], kind: Kind, processes: int | None = None) -> dict[str, str]:
    """Build the modules that are not there yet into the user's cache; says so line by line.

    Args:
        specs: as `AttentionSpec.parse` reads them.
        kind: of this machine's device that they are for.
        processes: at once, by default one for each core, `MOST` at most.

    Returns:
        The canonical form of those that could not be built, and why.
    """
    device, failed = DeviceProfile.detect(kind), {}
    wanted = dict.fromkeys(AttentionSpec.parse(text) for text in specs)
    missing = [spec for spec in wanted if not _is_there(spec, device)]
    if missing:
        print(f"{len(missing)} of {len(wanted)} modules are to be built", flush=True)
    for spec, seconds, error in _built(missing, device, processes):
        print(f"built {spec}: {error or f'{seconds:.1f} s'}", flush=True)
        if error:
            failed[str(spec)] = error
    return failed


def _is_there(spec: AttentionSpec, device: DeviceProfile) -> bool:
    return any(candidate.taken for candidate in candidates(spec, device))


def _built(
    specs: list[AttentionSpec], device: DeviceProfile, processes: int | None
) -> Iterator[tuple[AttentionSpec, float, str]]:
    """Each with its seconds, and its error or nothing, in the order in which they end."""
    if not specs:
        return
    count = min(processes or min(MOST, len(os.sched_getaffinity(0))), len(specs))
    # Spawned: CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        futures = {pool.submit(_build, str(spec), device): spec for spec in specs}
        for future in as_completed(futures):
            try:
                yield futures[future], *future.result()
            except Exception as error:  # its process has died, and all others with it
                yield futures[future], 0.0, last_line(error)


def _build(spec: str, device: DeviceProfile) -> tuple[float, str]:
    """Seconds, and an error or nothing."""
    import torch  # noqa: F401  (before TVM, whose libraries would otherwise shadow its own)

    from deft_tvm.artifact import find

    begin, error = time.perf_counter(), ""
    try:
        find(AttentionSpec.parse(spec), device)
    except Exception as caught:
        error = last_line(caught)
    return time.perf_counter() - begin, error


if __name__ == "__main__":
    main()
