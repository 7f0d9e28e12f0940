"""Every peer computes the same attention, exactly, or says why it cannot."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from small import FEW_SHOT, SPEC

from deft_tvm.dtypes import Dtype
from deft_tvm.peers import FLASHINFER, PEERS, QUICK, Gathered, peer, tvm_tree
from deft_tvm.peers.pieces import batches, by_level, by_prefix, by_tree
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors

#: Rows in empty and in bidirectional nodes, several in one, a path without branches.
ODD = Forest.from_parents(
    parents=[-1, 0, 0, 1, 1, -1, 5, -1],
    lengths=[0, 5, 4, 0, 3, 9, 30, 7],
    rows=[0, 2, 3, 2, 1, 2, 20, 0],
    bidirectional=np.array([0, 1, 0, 0, 0, 0, 1, 0], bool),
)
#: The row of a tree without tokens sees nothing.
BLIND = Forest.from_parents([-1, -1, 1], [0, 9, 3], [1, 0, 2])
FORESTS = {"odd": ODD, "blind": BLIND} | {
    name: parse(name).forest
    for name in (
        FEW_SHOT,
        "few_shot:prompt=20,branches=40,tokens=600,vary=9",
        "forest:trees=8,prompt=20",
        "speculative:nodes=12,context=40,batch=3",
        "multi_step:root=60,levels=3,width=4,tokens=20",
        "sequences:count=4,tokens=50",
    )
}


def spec_of(variant: str, dtype: Dtype) -> AttentionSpec:
    if variant == "mla":
        return AttentionSpec.mla(
            num_q_heads=4,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            dtype=dtype,
        )
    if variant == "gta":
        return AttentionSpec.gta(
            num_q_heads=8, num_kv_heads=2, head_dim=16, rope_dim=8, dtype=dtype
        )
    return AttentionSpec.gqa(
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=16,
        dtype=dtype,
        layout="HND" if variant == "window" else "NHD",
        window=25 if variant == "window" else None,
    )


def assert_exact(name: str, case: Case) -> None:
    gathered = Gathered(case)
    assert PEERS[name].lacks(gathered) is None
    with torch.inference_mode():
        call = PEERS[name].make(gathered)
        call()
        out = PEERS[name].ordered(gathered, call())
    exact = case.reference()
    bound = exact.bound(case.spec.dtype, case.spec.dtype).out
    assert out.shape == exact.out.shape
    assert out.dtype == case.q.dtype
    assert float((out.double() - exact.out).abs().max()) <= bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workload", FORESTS)
@pytest.mark.parametrize("name", QUICK)
def test_peers_are_exact(name: str, workload: str, dtype: Dtype) -> None:
    assert_exact(name, tensors(FORESTS[workload], spec_of("gqa", dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["window", "mla", "gta"])
@pytest.mark.parametrize("workload", ["odd", "blind", FEW_SHOT])
@pytest.mark.parametrize("name", QUICK)
def test_variants_are_exact(name: str, workload: str, variant: str, dtype: Dtype) -> None:
    assert_exact(name, tensors(FORESTS[workload], spec_of(variant, dtype)))


@pytest.mark.parametrize("name", QUICK)
def test_peers_without_pages(name: str) -> None:
    assert_exact(name, tensors(FORESTS[FEW_SHOT], SPEC, contiguous=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workload", FORESTS)
def test_tree_attention_of_tvm_is_exact(workload: str, dtype: Dtype) -> None:
    case = tensors(FORESTS[workload], spec_of("gqa", dtype))
    if workload == "blind":
        assert PEERS["tvm"].lacks(Gathered(case)) == "a row sees nothing, which it does not know"
    else:
        assert_exact("tvm", case)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_flex_is_exact() -> None:
    assert_exact("flex", tensors(ODD, spec_of("mla", "float32")))


def test_widths_that_differ_are_filled_with_zeros() -> None:
    gathered = Gathered(tensors(FORESTS[FEW_SHOT], spec_of("mla", "float32")))
    assert gathered.v is gathered.k
    assert all(s.v is s.k for s in gathered.sequences)
    narrow = AttentionSpec.gla(
        num_q_heads=2, num_latent_heads=1, latent_dim=16, rope_dim=0, nope_dim=16
    )
    assert Gathered(tensors(FORESTS[FEW_SHOT], narrow)).k.shape[2] == 16


def calls_of(gathered: Gathered, cut) -> list[tuple[int, int, int, bool]]:
    """Pieces, rows and tokens of each call, and whether it is masked."""
    return [
        (len(b.tokens), b.rows, b.tokens.shape[1], b.seen is not None)
        for b in batches(gathered, cut(gathered))
    ]


def test_pieces_of_a_tree() -> None:
    spec = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=16)
    forest = parse("few_shot:prompt=1000,branches=8,tokens=200").forest
    gathered = Gathered(tensors(forest, spec))
    assert calls_of(gathered, by_tree) == [(1, 8, 2600, True)]
    assert calls_of(gathered, by_prefix) == [(1, 8, 1000, False), (1, 8, 1600, True)]
    assert calls_of(gathered, by_level) == [(1, 8, 1000, False), (8, 1, 200, False)]


def test_nodes_with_the_same_rows_are_one_piece_and_small_ones_are_read_together() -> None:
    chain = Gathered(tensors(parse("multi_step").forest, spec_of("gqa", "float32")))
    assert calls_of(chain, by_level) == [(1, 10, 1800, False), (10, 1, 300, False)]
    small = Gathered(tensors(parse("few_shot:prompt=50,branches=9,tokens=2").forest, SPEC))
    assert calls_of(small, by_level) == [(1, 9, 68, True)]


@pytest.mark.parametrize("name", [name for name in PEERS if name not in FLASHINFER])
def test_what_peers_lack(name: str) -> None:
    for option, what in (({"soft_cap": 5.0}, "soft cap"), ({"sinks": True}, "sinks")):
        spec = AttentionSpec.gqa(num_q_heads=2, num_kv_heads=2, head_dim=16, **option)
        lacks = PEERS[name].lacks(Gathered(tensors(FORESTS[FEW_SHOT], spec)))
        assert lacks == f"it has no {what}"


def test_large_copies_and_masks_are_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = Gathered(tensors(FORESTS[FEW_SHOT], SPEC))
    monkeypatch.setattr(peer, "MOST_COPIED", 16)
    assert PEERS["folded"].lacks(gathered) == "its copies of KV take 0.0 GiB"
    assert PEERS["masked"].lacks(gathered) == "its mask takes 0.0 GiB"
    assert PEERS["cascade"].lacks(gathered) == "its masks may take 0.0 GiB"


def test_tools_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = Gathered(tensors(FORESTS[FEW_SHOT], SPEC))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert PEERS["flex"].lacks(gathered) == "there is no g++ to compile it with"
    monkeypatch.setattr(tvm_tree, "find_spec", lambda _: None)
    assert PEERS["tvm"].lacks(gathered) == "it needs TVM (pip install '.[tune]')"


def test_tvm_lacks_windows_and_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Gathered(tensors(FORESTS[FEW_SHOT], spec_of("window", "float32")))
    assert PEERS["tvm"].lacks(window) == "it has no window"
    monkeypatch.setattr(tvm_tree, "FLOP_PER_SECOND", 1e5)
    long = Gathered(tensors(FORESTS[FEW_SHOT], SPEC))
    assert PEERS["tvm"].lacks(long) == "one call would take about 15 s"
