from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import toy_artifact
import tvm_ffi

from deft_tvm import threads
from deft_tvm.errors import ArtifactError, CompilerMissing
from deft_tvm.native import TORCH_POOL, compile_c


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_artifact.export(tmp_path_factory)


@pytest.fixture
def fresh(exported: Path, tmp_path: Path) -> Path:
    """A copy that this process has not loaded yet."""
    return Path(shutil.copy(exported, tmp_path))


@pytest.fixture
def module(exported: Path) -> tvm_ffi.Module:
    loaded = tvm_ffi.load_module(exported)
    assert threads.adopt_pool(exported)
    return loaded


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_doubles(module: tvm_ffi.Module, rows: int = 300) -> None:
    source = torch.randn(rows, 64)
    result = torch.full_like(source, torch.nan)
    module["doubled"](source, result)
    assert torch.equal(result, source * 2)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_python(script: str, *arguments: object) -> str:
    """Standard output of `script` in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_row_is_computed(
    module: tvm_ffi.Module, set_threads: Callable[[int], None], rows: int, count: int
) -> None:
    set_threads(count)
    assert_doubles(module, rows)


def test_serial_without_a_pool(fresh: Path) -> None:
    assert_doubles(tvm_ffi.load_module(fresh))


def test_tasks_are_many_and_each_runs_once(fresh: Path) -> None:
    module = tvm_ffi.load_module(fresh)
    library, asked, bodies = ctypes.CDLL(str(fresh)), [], 5
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, body_type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(body: Callable[[int], None], data: int, count: int, flags: int) -> None:
        asked.append(count)
        for _ in range(bodies):
            body(data)

    count_threads = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 4)
    library.deft_set_pool(parallel, count_threads)
    numbers = torch.zeros(1000, dtype=torch.int32)
    module["counted"](numbers)
    library.deft_set_pool(None, None)
    assert asked == [4]
    assert numbers.unique().tolist() == [1]


def test_torch_governs_a_thread_that_ran_no_operator(
    module: tvm_ffi.Module, set_threads: Callable[[int], None]
) -> None:
    pool = threads._torch_pool()
    assert pool is not None
    _, count_threads = pool
    count = ctypes.cast(count_threads, ctypes.CFUNCTYPE(ctypes.c_int))
    set_threads(3)
    seen: list[int] = []
    worker = threading.Thread(target=lambda: seen.append(count()))
    worker.start()
    worker.join()
    assert seen == [3]


def test_nested_in_a_parallel_region(module: tvm_ffi.Module) -> None:
    openmp = ctypes.CDLL(torch._C.__file__)
    passed: list[bool] = []
    source = torch.randn(100, 64)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_: int) -> None:
        result = torch.empty_like(source)
        module["doubled"](source, result)
        passed.append(torch.equal(result, source * 2))

    openmp.GOMP_parallel(region, None, 2, 0)
    assert passed == [True, True]


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_task_reaches_the_caller(
    module: tvm_ffi.Module, set_threads: Callable[[int], None], count: int
) -> None:
    set_threads(count)
    numbers = torch.zeros(1000, dtype=torch.int32)
    numbers[-1] = -1
    for _ in range(3):
        with pytest.raises(RuntimeError, match="negative element"):
            module["counted"](numbers)
    assert_doubles(module)


def test_the_pool_is_torch_s(module: tvm_ffi.Module) -> None:
    torch.randn(1 << 20).mul(2)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        assert_doubles(module)
    assert len(os.listdir("/proc/self/task")) == before


def test_two_threads_at_once(module: tvm_ffi.Module) -> None:
    failures: list[BaseException] = []

    def call() -> None:
        try:
            for rows in range(1, 200):
                assert_doubles(module, rows)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=call) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_memory_stays_over_1000_calls(module: tvm_ffi.Module) -> None:
    source = torch.randn(64, 64)
    result = torch.empty_like(source)
    for _ in range(100):
        module["doubled"](source, result)
    before = resident_bytes()
    for _ in range(1000):
        module["doubled"](source, result)
    # One lost workspace of 64 KiB a call would be 64 MB.
    assert resident_bytes() - before < 4e6


def test_memory_of_threads_that_ended_comes_back(module: tvm_ffi.Module) -> None:
    source = torch.randn(64, 64)
    result = torch.empty_like(source)

    def churn(count: int) -> None:
        for _ in range(count):
            worker = threading.Thread(target=module["doubled"], args=(source, result))
            worker.start()
            worker.join()

    churn(20)
    before = resident_bytes()
    churn(200)
    # A lost workspace of 64 KiB for each thread would be 13 MB.
    assert resident_bytes() - before < 6e6


RUN_WITHOUT_TVM = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tvm":
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
import torch, tvm_ffi
from deft_tvm import threads
module = tvm_ffi.load_module(sys.argv[1])
assert threads.adopt_pool(sys.argv[1])
a = torch.randn(1000, 64); b = torch.empty_like(a)
module["doubled"](a, b)
assert torch.equal(b, a * 2) and "tvm" not in sys.modules
print("right")
"""

RUN_BESIDE_TVM = """
import os, sys
if sys.argv[2] == "before": import tvm
import torch, tvm_ffi
from deft_tvm import threads
ours = tvm_ffi.load_module(sys.argv[1])
threads.adopt_pool(sys.argv[1])
if sys.argv[2] == "after": import tvm
sys.path.insert(0, sys.argv[3])
import toy_module
a = torch.randn(1000, 64)
def right(module):
    b = torch.empty_like(a)
    module["doubled"](a, b)
    return torch.equal(b, a * 2)
a.repeat(100, 1).mul(2)
tasks = lambda: len(os.listdir("/proc/self/task"))
before = tasks()
assert right(ours)
assert tasks() == before, "our module started threads"
theirs = tvm.compile(toy_module.doubled.with_attr("global_symbol", "doubled"), target="llvm")
assert right(theirs.mod)
assert tasks() > before, "TVM's module did not start TVM's pool"
assert right(ours)
print("right")
"""


def test_runs_where_tvm_is_not_installed(exported: Path) -> None:
    assert run_python(RUN_WITHOUT_TVM, exported) == "right"


@pytest.mark.parametrize("order", ["before", "after"])
def test_each_keeps_its_pool_beside_tvm(
    exported: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_NUM_THREADS", "2")
    assert run_python(RUN_BESIDE_TVM, exported, order, Path(__file__).parent) == "right"


def test_no_openmp_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda path: object())
    with pytest.warns(UserWarning, match="no OpenMP pool here: kernels run on one thread"):
        assert threads._torch_pool.__wrapped__() is None


def test_a_module_without_the_launcher_is_refused() -> None:
    foreign = torch._C.__file__
    with pytest.raises(ArtifactError, match="has no deft_set_pool; expected a deft_tvm module"):
        threads.adopt_pool(foreign)


def test_missing_or_failing_c_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompilerMissing, match="cc is 'no-such-cc'; expected a C compiler"):
        compile_c(TORCH_POOL, tmp_path, cc="no-such-cc")
    with pytest.raises(CompilerMissing, match=r"false .*torch_pool.c.* failed"):
        compile_c(TORCH_POOL, tmp_path, cc="false")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(CompilerMissing, match="no C compiler"):
        compile_c(TORCH_POOL, tmp_path)
