"""The emulation itself: what it refuses, and how copies land and threads take turns."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from emulate import PRELUDE_END, Arguments, EmulationError, sanitizer, translate
from ptx import without_inline_ptx

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")

COPY = r"""
__device__ __forceinline__ void deft_fetch(void* tile, const void* row) {
  unsigned address = __cvta_generic_to_shared(tile);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(address), "l"(row) : "memory");
}
__device__ __forceinline__ void deft_close_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void deft_wait_but(int latest) {
  switch (latest) {
    case 0: asm volatile("cp.async.wait_group %0;" :: "n"(0) : "memory"); break;
    case 1: asm volatile("cp.async.wait_group %0;" :: "n"(1) : "memory"); break;
    default: asm volatile("cp.async.wait_all;" ::: "memory");
  }
}
"""
KERNEL = """
extern "C" __global__ void __launch_bounds__({threads}, 1) made_kernel(
    int* __restrict__ x_ptr, int* __restrict__ y_ptr) {{
  extern __shared__ __align__(64) uchar buf_dyn_shmem_ptr[];
  __shared__ alignas(64) int table_ptr[1024];
  int* tile = (int*)buf_dyn_shmem_ptr;
  int thread = threadIdx.y * 32 + threadIdx.x;
  {body}
}}
"""


def written(body: str, folder: Path, threads: int = 64, last_first: bool = False) -> list[int]:
    """What each thread left in ``y``; ``x`` holds 1000, 1001, ..."""
    kernel = translate(made(body, threads), "made")
    arguments = arguments_for(threads)
    kernel.run(folder, 1, arguments, last_first)
    return arguments["y"].tolist()


def made(body: str, threads: int = 64) -> str:
    return PRELUDE_END + COPY + KERNEL.format(threads=threads, body=body)


def arguments_for(threads: int) -> Arguments:
    x = torch.arange(1000, 1000 + 8 * threads, dtype=torch.int32)
    return {"x": x, "y": torch.full((threads,), -7, dtype=torch.int32)}


FETCH = "deft_fetch(tile + 4 * (thread + 64 * {0}), x_ptr + 4 * thread + {0} * 256);"


@pytest.mark.parametrize(
    ("wait", "landed"),
    [("0", [True, True, False]), ("1", [True, False, False]), ("-1", [True, True, True])],
)
def test_a_copy_lands_at_the_wait_for_its_group(
    wait: str, landed: list[bool], tmp_path: Path
) -> None:
    body = f"""
      {FETCH.format(0)} deft_close_group();
      {FETCH.format(1)} deft_close_group();
      {FETCH.format(2)}
      deft_wait_but({wait});
      y_ptr[thread] = 0;
      for (int i = 0; i < 3; ++i)
        y_ptr[thread] |= (tile[4 * (thread + 64 * i)] == x_ptr[4 * thread + i * 256]) << i;"""
    # The third one's last element alone would read beyond x.
    kernel = translate(made(body.replace("* 256", "* 0")), "made")
    arguments = arguments_for(64)
    kernel.run(tmp_path, 1, arguments)
    assert set(arguments["y"].tolist()) == {sum(bit << i for i, bit in enumerate(landed))}


def test_a_copy_under_way_spoils_what_was_there(tmp_path: Path) -> None:
    body = f"tile[4 * thread] = 5; {FETCH.format(0)} y_ptr[thread] = tile[4 * thread];"
    assert set(written(body, tmp_path)) == {-1}


def test_shared_memory_holds_nothing_at_first(tmp_path: Path) -> None:
    body = "y_ptr[thread] = tile[thread] & table_ptr[thread];"
    assert set(written(body, tmp_path)) == {-1}


def test_threads_run_in_either_order(tmp_path: Path) -> None:
    body = """
      table_ptr[0] = 0;
      __syncthreads();
      y_ptr[thread] = table_ptr[0]++;"""
    assert written(body, tmp_path) == list(range(64))
    assert written(body, tmp_path, last_first=True) == list(range(64))[::-1]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "if (thread < 40) { __syncthreads(); }",
            r"block 0, thread 0: waits at a barrier that not all threads reach \(line \d+\)",
        ),
        (
            "if (thread % 2) { y_ptr[0] = __shfl_xor_sync(0xffffffffu, thread, 1); }",
            "block 0, thread 1: waits at a barrier that not all threads reach",
        ),
        (
            "if (thread < 32) {\n __syncthreads();\n } else {\n __syncthreads();\n }",
            r"block 0, thread 32: is at another barrier than others \(line \d+\)",
        ),
        (
            "deft_fetch(tile + 1, x_ptr);",
            "block 0, thread 0: uses shared memory at an address that is not aligned",
        ),
        ("deft_fetch(tile, x_ptr + 1);", "thread 0: copies from an address that is not aligned"),
        ("deft_fetch(tile + 232448 / 4, x_ptr);", "thread 0: is beyond shared memory"),
    ],
)
def test_what_a_gpu_does_not_define_is_an_error(body: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match=sentence):
        written(body, tmp_path)


@pytest.mark.parametrize(("skipped", "races"), [((), False), ((0,), True), ((1,), True)])
def test_a_race_between_two_threads_is_seen(
    skipped: tuple[int, ...], races: bool, tmp_path: Path
) -> None:
    if sanitizer() is None:
        pytest.skip("programs of g++ -fsanitize=thread do not run here, setarch -R or not")
    body = f"""
      {FETCH.format(0)} deft_wait_but(-1);
      __syncthreads();
      int other = tile[4 * (thread ^ 32)];
      __syncthreads();
      {FETCH.format(0)}
      y_ptr[thread] = other;"""
    kernel = translate(made(body), "made")
    assert (kernel.barriers, kernel.waits) == (2, 1)
    outcome = kernel.apart(tmp_path, 1, arguments_for(64), skipped=skipped)
    assert (outcome.races > 0, outcome.failure) == (races, "")


def test_inline_ptx_becomes_calls() -> None:
    source = r"""asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
        "cp.async.ca.shared.global.L2::128B [%2], [%3], 8, %4;"
        : "=r"(held[0]), "=r"(held[1]) : "r"(f(a, b)), "l"(row), "r"(n ? 8 : 0) : "memory"); rest"""
    assert re.sub(r"\s+", " ", without_inline_ptx(source)) == (
        "ptx_ldmatrix<true>((f(a, b)), (held[0]), (held[1])); "
        "ptx_cp_async((f(a, b)), (row), 8, (n ? 8 : 0)); rest"
    )


def test_ptx_that_the_emulation_does_not_have_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"inline PTX 'tcgen05\.fence"):
        without_inline_ptx('asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");')
