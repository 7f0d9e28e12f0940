"""The computations as they are written, with no schedule, against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import tvm
import tvm_ffi
from compiled import Compiled, worst
from tvm.script import tirx as T

from deft_tvm.build import tasks_for
from deft_tvm.device import DeviceProfile
from deft_tvm.kernels import script
from deft_tvm.kernels.partial import partial_attention
from deft_tvm.plan import make_plan
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region, TileShape
from deft_tvm.tree import Forest
from deft_tvm.workloads import tensors

GQA = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
SHARED_STATE = AttentionSpec(
    num_q_heads=6,
    num_kv_heads=2,
    buffers=(CacheBuffer("state", 2, 24, "float32"), CacheBuffer("rope", 1, 8, "float32")),
    k=Region(0, 4, 20),
    v=Region(0, 0, 24),
    rope=1,
    scale=0.2,
    page_size=8,
)
ROPE_OF_EACH_HEAD = replace(
    SHARED_STATE,
    buffers=(CacheBuffer("state", 2, 24, "float32"), CacheBuffer("rope", 2, 8, "float32")),
)
SPECS = {
    "gqa": AttentionSpec.gqa(**GQA),
    "hnd": AttentionSpec.gqa(**GQA, layout="HND"),
    "bfloat16": AttentionSpec.gqa(**GQA, dtype="bfloat16"),
    "float16": AttentionSpec.gqa(**GQA, dtype="float16"),
    "odd widths": AttentionSpec.gqa(num_q_heads=3, num_kv_heads=1, head_dim=7, page_size=1),
    "shared state and rope": SHARED_STATE,
    "rope of each head": ROPE_OF_EACH_HEAD,
}

# Two roots; rows at an inner node and at leaves, three rows in one node, an empty node with a row,
# and a node without rows below it.
FOREST = Forest.from_parents(
    parents=[-1, 0, 0, 1, 1, -1, 5, 0],
    lengths=[13, 9, 1, 5, 0, 3, 0, 6],
    rows=[0, 3, 1, 2, 1, 1, 2, 0],
)


def unscheduled(spec: AttentionSpec, tile: TileShape) -> Compiled:
    tasks = tasks_for(spec, DeviceProfile.detect(), [tile])
    module = tvm.IRModule({task.symbol: task.computation for task in tasks})
    return Compiled(tasks, module)


@pytest.fixture(scope="module", params=SPECS, ids=str)
def kernels(request: pytest.FixtureRequest) -> tuple[AttentionSpec, Compiled]:
    spec = SPECS[request.param]
    return spec, unscheduled(spec, TileShape(4 * spec.group, 8, spec.dtype))


@pytest.mark.parametrize("grouping", ["node", "node_chunk", "flatten", "sequence", "packed"])
def test_as_written_is_right(kernels: tuple[AttentionSpec, Compiled], grouping: str) -> None:
    spec, compiled = kernels
    assert worst(compiled, tensors(FOREST, spec), grouping) <= 1


def test_contiguous_cache(kernels: tuple[AttentionSpec, Compiled]) -> None:
    spec, compiled = kernels
    if spec.layout == "NHD":
        assert worst(compiled, tensors(FOREST, spec, contiguous=True)) <= 1


@pytest.mark.parametrize("forest", [
    pytest.param(Forest.from_parents([-1], [1]), id="one token"),
    pytest.param(Forest.from_parents([-1], [0]), id="a row that sees nothing"),
    pytest.param(Forest.from_parents([-1, -1], [0, 5]), id="one of two rows sees nothing"),
    pytest.param(Forest.from_parents([-1, *range(40)], [1] * 41, [1] * 41), id="chain"),
    pytest.param(Forest.from_parents([-1] + [0] * 40, [3] + [1] * 40), id="star"),
    pytest.param(Forest.from_parents([-1], [37], [37]), id="prefill"),
])  # fmt: skip
def test_shapes_of_trees(kernels: tuple[AttentionSpec, Compiled], forest: Forest) -> None:
    spec, compiled = kernels
    assert worst(compiled, tensors(forest, spec)) <= 1


def test_large_logits(kernels: tuple[AttentionSpec, Compiled]) -> None:
    spec, compiled = kernels
    assert worst(compiled, tensors(FOREST, spec, max_logit=100.0)) <= 1


def test_nan_of_a_seen_token_is_not_hidden(kernels: tuple[AttentionSpec, Compiled]) -> None:
    spec, compiled = kernels
    case = tensors(FOREST, spec)
    page = case.pages.page_indices[case.pages.page_indptr[0]]
    case.buffers[spec.k.buffer][page] = torch.nan
    profile = DeviceProfile.detect()
    out, _ = compiled.run(case, make_plan(FOREST, case.pages, spec, compiled.tiles, profile))
    first_tree = FOREST.row_order[: FOREST.row_end[0]]
    assert out[torch.tensor(first_tree).long()].isnan().all()
    assert not out[torch.tensor(FOREST.row_order[FOREST.row_end[0] :]).long()].isnan().any()


@pytest.mark.parametrize("kind", ["llvm", "cuda"])
def test_text_is_read_as_tvm_reads_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = TileShape(4, 16, "float32")
    ours = partial_attention(SHARED_STATE, tile, kind)
    monkeypatch.setattr(script, "prim_func", T.prim_func)
    by_tvm = partial_attention.__wrapped__(SHARED_STATE, tile, kind)
    assert ours is not by_tvm and tvm_ffi.structural_equal(ours, by_tvm)


def test_a_mistake_in_a_kernel_is_shown_where_it_stands() -> None:
    told = r"Undefined variable: B[\s\S]*test_kernels.py:\d+[\s\S]*A\[0\] = B\[0\]"
    with pytest.raises(tvm.error.DiagnosticError, match=told):

        @script.prim_func(s_tir=True)
        def kernel(a: T.handle):
            A = T.match_buffer(a, (4,), "float32")
            A[0] = B[0]  # noqa: F821
