"""Barriers and waits of generated CUDA: none is missing, and one taken out shows.

Threads run to their next barrier in ascending or in descending order (`emulation/threads.h`), so
that a barrier which holds anything apart gives other results in one of them without it: such a one
must ThreadSanitizer report as missing. The others are idle.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from emulate import Arguments, EmulationError, Kernel, sanitizer
from problems import (
    BRANCHES,
    Problem,
    check,
    cuda_of,
    kernel_of,
    make_problem,
    merge_arguments,
    merge_task,
    partial_arguments,
    partial_task,
    results,
)

from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")

# A shared part and a branch with causal rows: whole tiles, cut ones, and a last one in part; more
# than are located at a time.
FOREST = Forest.from_parents([-1, 0], [270, 17], [0, 4])

MLA = "mla:hq=8,d=128,rope=16,dtype=bf16,scale=0.1"
EIGHT_BITS = "gqa:hq=4,hkv=1,d=64,kv_dtype=e4m3,dtype=f32,window=40"


class Case(NamedTuple):
    """A spec, its tile class, and of how many tiles there is room; None: by default."""

    spec: str
    tile: TileShape
    stages: int | None = None


CASES = {
    "scalar": Case("gqa:hq=4,hkv=1,d=64,dtype=f32", TileShape(16, 32, "float32")),
    "scalar, 8 bits": Case(EIGHT_BITS, TileShape(16, 32, "float32")),
    "tensor cores": Case("gqa:hq=4,hkv=1,d=64,dtype=f16", TileShape(32, 32, "float16")),
    "tensor cores, rope": Case(MLA, TileShape(16, 32, "bfloat16")),
    "tensor cores, rope, 4 stages": Case(MLA, TileShape(16, 32, "bfloat16"), 4),
    "groups": Case("gqa:hq=4,hkv=1,d=64,dtype=bf16", TileShape(64, 32, "bfloat16")),
    "groups, 3 stages": Case("gqa:hq=4,hkv=1,d=64,dtype=bf16", TileShape(64, 32, "bfloat16"), 3),
}

COPIES = [name for name in CASES if "8 bits" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are compiled once for all tests here."""
    return tmp_path_factory.mktemp("races")


@pytest.fixture(scope="module", autouse=True)
def _sanitized() -> None:
    if sanitizer() is None:
        pytest.skip("programs of g++ -fsanitize=thread do not run here, setarch -R or not")


@pytest.mark.parametrize("case", CASES)
def test_no_races(case: str, folder: Path) -> None:
    _, kernel, *launch = launch_of(case)
    ascending, descending = (kernel.apart(folder, *launch, way) for way in (False, True))
    assert (ascending.races, ascending.failure) == (0, "")
    assert ascending == descending


@pytest.mark.parametrize("case", CASES)
def test_a_missing_barrier_is_reported(case: str, folder: Path) -> None:
    """Barriers are taken out one after the other, as long as that changes nothing."""
    _, kernel, *launch = launch_of(case)
    right = kernel.apart(folder, *launch, watched=False)
    idle: set[int] = set()
    for barrier in range(kernel.barriers):
        skipped = {*idle, barrier}
        ways = [
            way
            for way in (False, True)
            if kernel.apart(folder, *launch, way, skipped, watched=False) != right
        ]
        if not ways:
            idle.add(barrier)
        else:
            assert kernel.apart(folder, *launch, ways[0], skipped).races, f"barrier {barrier}"
    assert len(idle) < kernel.barriers
    assert kernel.apart(folder, *launch, skipped=idle).races == 0, "idle ones do nothing together"


@pytest.mark.parametrize("case", COPIES)
def test_a_missing_wait_gives_wrong_results(case: str, folder: Path) -> None:
    """Copies land at the wait in emulation, as late as they may."""
    problem, kernel, blocks, arguments = launch_of(case)
    assert kernel.waits, "copies run beside the work"
    kernel.run(folder, blocks, arguments)
    check(problem)
    missed = []
    for wait in range(kernel.barriers, kernel.barriers + kernel.waits):
        forget(problem)
        kernel.run(folder, blocks, arguments, skipped={wait})
        missed.append(is_wrong(problem))
    assert any(missed), "that of the loop over tiles"


@pytest.mark.parametrize("case", COPIES)
def test_a_wait_that_leaves_one_group_more_gives_wrong_results(case: str, folder: Path) -> None:
    problem, kernel, blocks, arguments = launch_of(case)
    kernel.run(folder, blocks, arguments)
    check(problem)
    forget(problem)
    kernel.waiting_for_less().run(folder, blocks, arguments)
    assert is_wrong(problem)


@pytest.mark.parametrize(
    ("fence", "said"),
    [
        ("ptx_fence_proxy_async_shared_cta()", "copied without a fence after"),
        ("ptx_wgmma_fence_sync_aligned()", "in a group without a fence before"),
        ("ptx_wgmma_wait_group_sync_aligned(0)", "begins with other sums"),
    ],
)
def test_what_groups_of_warps_need_is_missed(fence: str, said: str, folder: Path) -> None:
    _, kernel, blocks, arguments = launch_of("groups")
    assert kernel.cpp.count(fence), "kernels have it"
    without = replace(kernel, cpp=kernel.cpp.replace(fence, ""))
    with pytest.raises(EmulationError, match=said):
        without.run(folder, blocks, arguments)


def test_merge_has_no_races(folder: Path) -> None:
    spec = AttentionSpec.parse(CASES["scalar"].spec)
    problem = make_problem(spec, BRANCHES, (CASES["scalar"].tile,))
    kernel = kernel_of(merge_task(spec))
    for partial in (problem.partial_out, problem.partial_lse):
        partial.zero_()
    assert kernel.apart(folder, 4, merge_arguments(problem)).races == 0


def launch_of(case: str) -> tuple[Problem, Kernel, int, Arguments]:
    """A problem, and the kernel, blocks and arguments of its first launch. An item has all that its
    rows see, and nothing is left to merge."""
    text, tile, stages = CASES[case]
    problem = make_problem(AttentionSpec.parse(text), FOREST, (tile,), "flatten", chunk=1024)
    _, begin, end = problem.plan.launches[0]
    blocks = (end - begin) * problem.case.spec.num_kv_heads
    kernel = partial_kernel(problem.case.spec, tile, stages)
    return problem, kernel, blocks, partial_arguments(problem, begin, end)


@cache
def partial_kernel(spec: AttentionSpec, tile: TileShape, stages: int | None) -> Kernel:
    decision = {} if stages is None else {"stages": stages}
    return kernel_of(partial_task(spec, tile), lambda task: cuda_of(task, decision))


def forget(problem: Problem) -> None:
    for result in results(problem).values():
        result.fill_(float("nan"))


def is_wrong(problem: Problem) -> bool:
    try:
        check(problem)
    except AssertionError:
        return True
    return False
