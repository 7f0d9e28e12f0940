"""Plan and run of exported modules against the oracle: any tree, any cache, every kind of spec."""

from __future__ import annotations

import pytest
import torch
from built import SMALL, artifact
from cases import forests
from hypothesis import given, settings
from hypothesis import strategies as st

from deft_tvm.check import check
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors

GROUPINGS = ("node", "node_chunk", "flatten", "sequence", "packed", "auto")


def gqa(group: int, head_dim: int, dtype: str, page_size: int, layout: str) -> AttentionSpec:
    heads = 1 if group > 4 else 2
    return AttentionSpec.gqa(
        num_q_heads=heads * group,
        num_kv_heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        page_size=page_size,
        layout=layout,
    )


# Every dtype meets every layout; widths, groups and page sizes meet them in turn.
SPECS = {
    "mha-f32": gqa(1, 64, "float32", 16, "NHD"),
    "group2-f16-hnd": gqa(2, 80, "float16", 1, "HND"),
    "group3-bf16": gqa(3, 96, "bfloat16", 8, "NHD"),
    "group4-bf16-hnd": gqa(4, 128, "bfloat16", 16, "HND"),
    "group8-f32-hnd": gqa(8, 256, "float32", 4, "HND"),
    "mqa16-f16": gqa(16, 64, "float16", 32, "NHD"),
    "shared-state-f32": AttentionSpec(
        num_q_heads=6,
        num_kv_heads=2,
        buffers=(CacheBuffer("state", 2, 48, "float32"), CacheBuffer("rope", 1, 16, "float32")),
        k=Region(0, 8, 40),
        v=Region(0, 0, 48),
        rope=1,
        scale=0.2,
        page_size=8,
    ),
    "mla-bf16": AttentionSpec.mla(
        num_q_heads=8, kv_lora_rank=64, qk_rope_head_dim=32, qk_nope_head_dim=32, dtype="bfloat16"
    ),
    "gla2-f32": AttentionSpec.gla(
        num_q_heads=8, num_latent_heads=2, latent_dim=32, rope_dim=16, nope_dim=16, page_size=64
    ),
    "gta4-f16": AttentionSpec.gta(
        num_q_heads=8, num_kv_heads=4, head_dim=32, rope_dim=16, dtype="float16", page_size=1
    ),
    "all-options-bf16": AttentionSpec.gqa(
        num_q_heads=8, num_kv_heads=4, head_dim=64, dtype="bfloat16", kv_dtype="float8_e4m3fn",
        window=33, soft_cap=20.0, sinks=True, scale=0.2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SPECS, ids=str)
def attention(request: pytest.FixtureRequest) -> TreeAttention:
    return TreeAttention(SPECS[request.param], artifact(SPECS[request.param]))


@pytest.fixture
def small() -> TreeAttention:
    return TreeAttention(SMALL, artifact(SMALL))


def assert_exact(case: Case, attention: TreeAttention) -> None:
    found = check(case, attention)
    assert found.holds, found


@settings(max_examples=20)
@given(
    forest=forests(),
    grouping=st.sampled_from(GROUPINGS),
    contiguous=st.booleans(),
    max_logit=st.sampled_from([None, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_any_forest(
    attention: TreeAttention,
    forest: Forest,
    grouping: str,
    contiguous: bool,
    max_logit: float | None,
    seed: int,
) -> None:
    attention.grouping = grouping
    case = tensors(forest, attention.spec, seed, contiguous=contiguous, max_logit=max_logit)
    assert_exact(case, attention)


@pytest.mark.parametrize("workload", [
    "few_shot:prompt=500,branches=20,tokens=40,vary=30",
    "speculative:nodes=26,context=120,batch=2",
])  # fmt: skip
def test_workloads(attention: TreeAttention, workload: str) -> None:
    attention.grouping = "auto"
    assert_exact(tensors(parse(workload).forest, attention.spec), attention)


@pytest.mark.parametrize("forest", [
    pytest.param(Forest.from_parents([], []), id="no nodes"),
    pytest.param(Forest.from_parents([-1], [9], [0]), id="no rows"),
    pytest.param(Forest.from_parents([-1], [0]), id="a row that sees nothing"),
    pytest.param(Forest.from_parents([-1, -1], [0, 5], [2, 1]), id="some rows see nothing"),
    pytest.param(Forest.from_parents([-1], [1]), id="one token"),
    pytest.param(Forest.from_parents([-1, 0, 0], [9, 0, 0]), id="empty leaves"),
    pytest.param(Forest.from_parents([-1], [70], [70]), id="prefill"),
    pytest.param(Forest.from_parents([-1, *range(2000)], [1] * 2001), id="chain"),
    pytest.param(Forest.from_parents([-1] + [0] * 1000, [3] + [1] * 1000), id="star"),
])  # fmt: skip
@pytest.mark.parametrize("contiguous", [False, True], ids=["paged", "contiguous"])
def test_shapes_of_trees(small: TreeAttention, forest: Forest, contiguous: bool) -> None:
    assert_exact(tensors(forest, SMALL, contiguous=contiguous), small)


def paged(dtype: str = "float32") -> Case:
    """Two trees, so that nodes of one share pages with nodes of the other."""
    forest = Forest.from_parents([-1, 0, 0, -1, 3, 3], [9, 2, 3, 6, 1, 2], [0, 1, 2, 0, 1, 1])
    return tensors(forest, SMALL)


def run(attention: TreeAttention, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    attention.plan(case.forest, case.pages)
    return attention.run(case.q, case.buffers)


def same(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 3e38])
def test_what_slots_beside_the_tokens_hold_changes_nothing(
    small: TreeAttention, grouping: str, poison: float
) -> None:
    small.grouping = grouping
    case = paged()
    clean = tuple(buffer.nan_to_num(0.0) for buffer in case.buffers)
    dirty = tuple(buffer.nan_to_num(poison) for buffer in case.buffers)
    small.plan(case.forest, case.pages)
    assert same(small.run(case.q, dirty), small.run(case.q, clean))


@pytest.mark.parametrize("grouping", ["node", "node_chunk", "sequence", "packed", "auto"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_another_tree_in_the_same_pages_changes_nothing(
    small: TreeAttention, grouping: str, poison: float
) -> None:
    """``flatten``, as in the paper, may put both in one item, in which 0 · NaN meets every row."""
    small.grouping = grouping
    case = paged()
    clean = run(small, case)
    for node in (3, 4, 5):
        for t in range(case.forest.lengths[node]):
            entry, slot = divmod(int(case.pages.first_slot[node]) + t, SMALL.page_size)
            page = case.pages.page_indices[case.pages.page_indptr[node] + entry]
            for buffer in case.buffers:
                buffer[page, slot] = poison
    dirty = small.run(case.q, case.buffers)
    assert same(tuple(x[:3] for x in dirty), tuple(x[:3] for x in clean))
    assert dirty[0][3:].isnan().any(), "what a row sees is not hidden"


def test_strides_but_the_last_are_free(small: TreeAttention) -> None:
    case = paged()
    expected = run(small, case)
    kv = torch.stack(case.buffers, dim=2).unbind(2)
    wide = torch.randn(len(case.q), 3, 4, 17)
    wide[:, 1, :, 1:] = case.q
    q = wide[:, 1, :, 1:]
    assert not q.is_contiguous() and not kv[0].is_contiguous() and q.data_ptr() % 8
    assert same(small.run(q, kv), expected)


def test_outputs_are_written_where_they_are_given(small: TreeAttention) -> None:
    case = paged()
    expected = run(small, case)
    out, lse = (torch.full_like(tensor, torch.nan) for tensor in expected)
    given_out, given_lse = small.run(case.q, case.buffers, out, lse)
    assert given_out is out and given_lse is lse and same((out, lse), expected)
    out.fill_(torch.nan)
    assert same(small.run(case.q, case.buffers, out=out), expected)
    assert torch.equal(out, expected[0])


def test_pages_as_torch_tensors_and_as_lists(small: TreeAttention) -> None:
    case, table = paged(), paged().pages
    expected = run(small, case)
    arrays = [table.page_indices, table.page_indptr, table.first_slot]
    small.plan(case.forest, *(torch.tensor(array) for array in arrays))
    assert same(small.run(case.q, case.buffers), expected)
    small.plan(case.forest, *(array.tolist() for array in arrays))
    assert same(small.run(case.q, case.buffers), expected)


def test_update_of_lengths_and_of_pages(small: TreeAttention) -> None:
    grown = Forest.from_parents([-1, 0, 0], [30, 6, 9])
    before = grown.with_lengths([30, 4, 5])
    case = tensors(grown, SMALL)
    small.plan(before, case.pages)
    small.update([30, 6, 9])
    exact = case.reference()
    out, _ = small.run(case.q, case.buffers)
    assert (out - exact.out).abs().max() <= exact.bound().out

    moved = tensors(grown, SMALL, seed=1)
    small.update(None, moved.pages.page_indices, moved.pages.page_indptr, moved.pages.first_slot)
    exact = moved.reference()
    out, _ = small.run(moved.q, moved.buffers)
    assert (out - exact.out).abs().max() <= exact.bound().out


def test_update_of_a_cache_without_pages(small: TreeAttention) -> None:
    case = tensors(Forest.from_parents([-1, 0, 0], [30, 6, 9]), SMALL, contiguous=True)
    small.plan(case.forest.with_lengths([29, 2, 3]))
    small.update(case.forest)
    exact = case.reference()
    out, _ = small.run(case.q, case.buffers)
    assert (out - exact.out).abs().max() <= exact.bound().out


@pytest.mark.parametrize("first", [0, 3], ids=["other tree after", "other tree before"])
def test_deterministic_rows_do_not_depend_on_other_trees(first: int) -> None:
    """Of a tree whose prompt is cut, beside one that adds items, rows and pages to the plan."""
    attention = TreeAttention(SMALL, artifact(SMALL), deterministic=True)
    tree, other = [1300, 20, 7], [700, 2, 30]
    lengths = tree + other if first == 0 else other + tree
    both = tensors(Forest.from_parents([-1, 0, 0, -1, 3, 3], lengths, [0, 2, 3] * 2), SMALL)
    with_both = run(attention, both)

    table, rows = both.pages, slice(5, 10) if first else slice(0, 5)
    indptr = table.page_indptr[first : first + 4]
    alone = Forest.from_parents([-1, 0, 0], tree, [0, 2, 3])
    indices, slots = table.page_indices[indptr[0] : indptr[3]], table.first_slot[first : first + 3]
    plan = attention.plan(alone, indices, indptr - indptr[0], slots)
    assert sorted(plan.items[:, 4].tolist()) == [7, 20, 276, 512, 512]
    assert same(attention.run(both.q[rows], both.buffers), tuple(x[rows] for x in with_both))
