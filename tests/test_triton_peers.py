"""Peers in Triton: exact on CUDA, and in Triton's interpreter where there is none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from deft_tvm.errors import InputError
from deft_tvm.peers import PEERS, Gathered
from deft_tvm.peers.triton import TRITON
from deft_tvm.peers.triton.fasttree import Setting, copied_edges, fasttree
from deft_tvm.peers.triton.flatten import flatten
from deft_tvm.peers.triton.launch import Tiling, block, step
from deft_tvm.peers.triton.plan import Plan, Tokens
from deft_tvm.peers.triton.search import Search, tilings
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON_THERE = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not (TRITON_THERE and (INTERPRETED or DEVICE == "cuda")), reason="nothing runs Triton here"
)

#: Rows in empty and in bidirectional nodes, several in one, a path without branches, a blind row.
ODD = Forest.from_parents(
    parents=[-1, 0, 0, 1, 1, -1, 5, -1, -1, 8, 8],
    lengths=[0, 5, 4, 0, 3, 9, 30, 7, 0, 0, 6],
    rows=[0, 2, 3, 2, 1, 2, 20, 0, 0, 1, 1],
    bidirectional=np.array([0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0], bool),
)
FORESTS = {"odd": ODD, "nothing": Forest.from_parents([], [])} | {
    name: parse(name).forest
    for name in (
        "few_shot:prompt=100,branches=9,tokens=9,vary=3",
        "speculative:nodes=12,context=77,batch=2",
        "multi_step:root=60,levels=3,width=3,tokens=20",
        "sequences:count=3,tokens=90",
        "beam:prompt=70,beams=5,tokens=8",
    )
}
MHA = AttentionSpec.gqa(num_q_heads=3, num_kv_heads=3, head_dim=64, dtype="float16")
SPECS = {
    "gqa": AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=128, dtype="bfloat16"),
    "mha": MHA,
    "mqa": AttentionSpec.gqa(
        num_q_heads=16, num_kv_heads=1, head_dim=128, dtype="float16", layout="HND"
    ),
    "width": AttentionSpec.gqa(num_q_heads=6, num_kv_heads=2, head_dim=72, dtype="float16"),
    "mla": AttentionSpec.mla(
        num_q_heads=16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        dtype="bfloat16",
    ),
    "gla": AttentionSpec.gla(
        num_q_heads=8,
        num_latent_heads=2,
        latent_dim=256,
        rope_dim=64,
        nope_dim=128,
        dtype="float16",
        layout="HND",
    ),
    "ropes": AttentionSpec.gla(
        num_q_heads=36,
        num_latent_heads=2,
        latent_dim=40,
        rope_dim=8,
        nope_dim=16,
        rope_heads=2,
        dtype="float16",
    ),
    "gta": AttentionSpec.gta(
        num_q_heads=8, num_kv_heads=2, head_dim=64, rope_dim=32, dtype="float16"
    ),
}
FEW_SHOT = "few_shot:prompt=100,branches=9,tokens=9,vary=3"


@pytest.fixture(scope="module", autouse=True)
def bfloat16_products() -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as integers, and multiplies them as such."""
    if not (INTERPRETED and TRITON_THERE):
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    product = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: product(self, wide(a), wide(b), *rest)
    yield
    InterpreterBuilder.create_dot = product


@pytest.fixture
def first_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search: it compiles for long."""
    monkeypatch.setattr(Search, "fastest", lambda _, choices: next(iter(choices)))


def case_of(forest: Forest, spec: AttentionSpec, **options) -> Case:
    case = tensors(forest, spec, **options)
    return replace(
        case, q=case.q.to(DEVICE), buffers=tuple(buffer.to(DEVICE) for buffer in case.buffers)
    )


def assert_exact(case: Case, out: torch.Tensor) -> None:
    exact = case.to("cpu").reference()
    assert out.shape == exact.out.shape
    assert out.dtype == case.q.dtype
    if out.numel():
        bound = exact.bound(case.spec.dtype, case.spec.dtype).out
        assert float((out.cpu().double() - exact.out).abs().max()) <= bound


def assert_peer_exact(name: str, case: Case) -> None:
    gathered = Gathered(case)
    assert TRITON[name].lacks(gathered) is None
    call = TRITON[name].make(gathered)
    call()
    copy = call.over_a_copy()
    for buffer, other in zip(case.buffers, copy.case.buffers, strict=True):
        assert buffer is not other
        # What holds nothing lies nowhere.
        assert not buffer.numel() or buffer.data_ptr() != other.data_ptr()
    for each in (call, copy):
        assert_exact(case, TRITON[name].ordered(gathered, each()))


@needs_triton
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("workload", FORESTS)
@pytest.mark.parametrize("name", TRITON)
def test_trees(name: str, workload: str) -> None:
    assert_peer_exact(name, case_of(FORESTS[workload], MHA))


@needs_triton
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("variant", SPECS)
@pytest.mark.parametrize("workload", ["odd", FEW_SHOT])
@pytest.mark.parametrize("name", TRITON)
def test_variants(name: str, workload: str, variant: str) -> None:
    assert_peer_exact(name, case_of(FORESTS[workload], SPECS[variant]))


@needs_triton
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TRITON)
def test_random_trees(name: str, seed: int) -> None:
    spec = AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=16, dtype="float16")
    assert_peer_exact(name, case_of(random_forest(seed), spec, seed=seed))


@needs_triton
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("name", TRITON)
def test_without_pages(name: str) -> None:
    assert_peer_exact(name, case_of(FORESTS[FEW_SHOT], MHA, contiguous=True))


@needs_triton
@pytest.mark.parametrize("lanes", [16, 32, 64, 128])
@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_and_tiles(chunk: int, lanes: int) -> None:
    case = case_of(parse("few_shot:prompt=20,branches=6,tokens=2,vary=1").forest, SPECS["gta"])
    plan = flatten(case.forest, case.spec.group, chunk, lanes)
    assert_exact(case, step(case, plan, {lanes: Tiling(lanes, 16, 4, 3)})())


@needs_triton
@pytest.mark.parametrize("split", [5, 64])
def test_splits(split: int) -> None:
    case = case_of(FORESTS[FEW_SHOT], SPECS["gta"])
    plan = fasttree(case.forest, 2, 4, split)
    assert set(plan.tiles) == {64, 16}
    tiles = {lanes: tilings(case.spec, lanes)[1] for lanes in plan.tiles}
    assert_exact(case, step(case, plan, tiles)())


@pytest.mark.skipif(
    not TRITON_THERE or INTERPRETED or DEVICE == "cuda", reason="no triton, or it runs in here"
)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this triton's interpreter is older than this numpy")
    assert done.returncode == 0, done.stdout
    assert "nothing runs Triton here" not in done.stdout


def random_forest(seed: int) -> Forest:
    """Nodes of all kinds in any order, several trees."""
    random = np.random.default_rng(seed)
    count = int(random.integers(5, 20))
    parents = [int(random.integers(-1, node)) if node else -1 for node in range(count)]
    lengths = random.choice([0, 1, 1, 3, 17, 40], count)
    rows = np.where(lengths > 0, random.integers(0, 4, count).clip(max=lengths), 1)
    order = random.permutation(count)
    place = order.argsort()
    moved = [-1 if parents[node] < 0 else int(place[parents[node]]) for node in order]
    return Forest.from_parents(moved, lengths[order], rows[order], random.random(count) < 0.3)


def pairs(plan: Plan, group: int) -> np.ndarray:
    """int[rows, tokens], how often the plan's tiles let a row read a token."""
    forest_tokens = int(plan.tokens.number.max(initial=-1)) + 1
    found = np.zeros((int(plan.entry_row.max(initial=-1)) + 1, forest_tokens), int)
    for tiles in plan.tiles.values():
        for begin, end, first, last in tiles.tolist():
            number, low, high = (
                getattr(plan.tokens, name)[begin:end] for name in ("number", "low", "high")
            )
            for lane in range(first, last):
                row = plan.entry_row[lane // group]
                np.add.at(found[row], number[(low <= row) & (row < high)], 1)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("group", [1, 3, 16])
def test_plans_read_each_token_once_for_each_row_that_sees_it(group: int, seed: int) -> None:
    forest = random_forest(seed)
    case = tensors(forest, AttentionSpec.gqa(num_q_heads=1, num_kv_heads=1, head_dim=16))
    seen = Gathered(case).seen.numpy().astype(int) * group
    plans = [flatten(forest, group, 16, 32), fasttree(forest, 2, group), fasttree(forest, 2, 1, 9)]
    for plan in plans:
        scale = 1 if plan is plans[2] else group
        found = pairs(plan, scale)
        rows, tokens = found.shape
        assert (found * (group // scale) == seen[:rows, :tokens]).all()
        assert not seen[rows:].any() and not seen[:, tokens:].any()
        ends = plan.merged[:, 2]
        assert plan.num_partials == (ends[-1] if len(ends) else 0)
        assert sorted(plan.entry_place[plan.entry_place >= 0]) == list(range(plan.num_partials))


def test_flatten_cuts_evenly_across_nodes() -> None:
    forest = Forest.from_parents([-1, 0, 0], [10, 6, 4])
    plan = flatten(forest, group=4, chunk=8, lanes=16)
    assert sorted(plan.tiles[16].tolist()) == [[0, 8, 0, 8], [8, 16, 8, 16], [16, 20, 16, 20]]
    assert plan.entry_row.tolist() == [0, 1, 0, 1, 1]
    assert plan.merged.tolist() == [[0, 0, 2], [1, 2, 5]]
    assert plan.masked


def test_a_tile_reads_what_its_rows_see() -> None:
    forest = Forest.from_parents([-1] * 4, [8] * 4)
    plan = flatten(forest, group=16, chunk=32, lanes=16)
    assert plan.tiles[16][:, :2].tolist() == [[0, 8], [8, 16], [16, 24], [24, 32]]
    assert plan.num_partials == 0
    assert (plan.entry_place == -1).all()


def test_fasttree_copies_a_context_where_that_pads_less() -> None:
    """17 rows are padded to 64, but 16 of them and one are padded to 32 in all."""
    parents, lengths = [-1, 0, 0] + [1] * 16, [100, 100, 30] + [50] * 16
    forest = Forest.from_parents(parents, lengths)
    assert copied_edges(forest, 1, Setting()).tolist() == [False, True, True] + [False] * 16
    plan = fasttree(forest, 1, 1, split=1000)
    assert plan.tiles[16].tolist()[:2] == [[0, 200, 0, 16], [1000, 1130, 32, 33]]
    assert plan.tokens.number[[0, 100, 1000, 1100]].tolist() == [0, 100, 0, 200]
    assert plan.num_partials == 32
    assert plan.entry_place[-1] == -1
    few_shot = Forest.from_parents([-1] + [0] * 16, [4000] + [400] * 16)
    assert not copied_edges(few_shot, 1, Setting()).any()


def test_fasttree_cuts_short_where_programs_are_few() -> None:
    forest = parse("few_shot:prompt=4000,branches=64,tokens=400").forest
    few = fasttree(forest, kv_heads=1, group=4)
    assert (few.tiles[16][:, 1] - few.tiles[16][:, 0]).max() == 128
    many = fasttree(forest, kv_heads=64, group=4)
    assert (many.tiles[64][:, 1] - many.tiles[64][:, 0]).max() == 1024
    assert (many.tiles[16][:, 1] - many.tiles[16][:, 0]).max() == 400
    assert not many.masked


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (replace(MHA, soft_cap=5.0), "it has no soft cap"),
        (replace(MHA, sinks=True), "it has no sinks"),
        (replace(MHA, window=9), "it has no window"),
        (
            AttentionSpec.gqa(num_q_heads=1, num_kv_heads=1, head_dim=16),
            "it takes q and KV of one type, bfloat16 or float16",
        ),
        (
            AttentionSpec.gqa(num_q_heads=1, num_kv_heads=1, head_dim=320, dtype="float16"),
            "it loads 1024 columns of a token and head, of which 640 fit",
        ),
    ],
)
def test_what_they_lack(spec: AttentionSpec, why: str) -> None:
    gathered = Gathered(tensors(FORESTS[FEW_SHOT], spec))
    assert [peer.lacks(gathered) for peer in TRITON.values()] == [why] * 2


def test_they_need_triton_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = Gathered(tensors(FORESTS[FEW_SHOT], MHA))
    lacks = TRITON["fasttree"].lacks
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("deft_tvm.peers.triton.peers.find_spec", lambda _: object())
    assert lacks(gathered) == "KV is on cpu, and it needs CUDA"
    monkeypatch.setattr("deft_tvm.peers.triton.peers.find_spec", lambda _: None)
    assert lacks(gathered) == "it needs triton"
    there = TRITON_THERE and torch.cuda.is_available()
    assert (TRITON.keys() <= PEERS.keys()) == there


def test_the_fastest_choice_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried once, those that do not fit are passed over."""
    times = {1: 3.0, 2: 2.0, 3: math.inf, 4: 1.0, 5: math.inf}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(Search, "_time", lambda _, choice: times.pop(choice))
    search = Search(lambda _: pytest.fail("it was made"))
    assert search.fastest([1, 3, 2, 1]) == 2
    assert search.fastest([2, 4]) == 4
    with pytest.raises(InputError, match=r"none of \[3, 5\] fits this device; expected one"):
        search.fastest([3, 5, 3])


@pytest.mark.skipif(DEVICE == "cpu" or not TRITON_THERE, reason="it needs CUDA and triton")
@pytest.mark.parametrize("name", TRITON)
def test_a_search_and_a_graph(name: str) -> None:
    case = case_of(FORESTS[FEW_SHOT], SPECS["gqa"])
    gathered = Gathered(case)
    call = TRITON[name].make(gathered)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = TRITON[name].ordered(gathered, call())
    out.fill_(torch.nan)
    graph.replay()
    assert_exact(case, out)


def test_the_first_choice_where_nothing_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Search(lambda _: pytest.fail("it was made")).fastest([3, 1, 2]) == 3


def test_many_rows() -> None:
    """Numbers that need all of half an integer."""
    forest = Forest.from_parents([-1] * 40000, [1] * 40000)
    tokens = Tokens.of_nodes(forest, forest.preorder)
    assert (tokens.sight & 0xFFFF).tolist() == list(range(40000))
    assert ((tokens.sight >> 16) & 0xFFFF).tolist() == list(range(1, 40001))


def test_blocks_and_tilings() -> None:
    assert [block(n) for n in (0, 1, 16, 17, 512)] == [16, 16, 16, 32, 512]
    assert tilings(SPECS["gqa"], 16)[0] == Tiling(16, 64, 4, 5)
    assert tilings(SPECS["mla"], 64) == (Tiling(64, 32, 8, 5), Tiling(64, 64, 8, 3))
