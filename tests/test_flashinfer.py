"""FlashInfer's peers: what they pass to it, with a stand-in for it, and itself on a GPU."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import fake_flashinfer
import pytest
import torch
from test_peers import BLIND, FORESTS, ODD

from deft_tvm.peers import FLASHINFER, Gathered, flashinfer, paged
from deft_tvm.reference import Exact
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import parse, tensors

HEADS = [name for name in FLASHINFER if "mla" not in name]
LATENT = [name for name in FLASHINFER if "mla" in name]
SEEING = {
    name: FORESTS[name] if name in FORESTS else parse(name).forest
    for name in (
        "odd",
        "forest:trees=8,prompt=20",
        "beam:prompt=37,beams=6,tokens=20",
        "speculative:nodes=12,context=40,batch=3",
        "few_shot:prompt=16,branches=5,tokens=32",
        "multi_step:root=60,levels=3,width=4,tokens=20",
        "sequences:count=4,tokens=50",
        "sequences:count=1,tokens=1",
    )
}
#: Sizes that its kernels are compiled for; on the CPU any will do.
LARGE = {
    "gqa": "gqa:hq=8,hkv=2,d=128,dtype=bf16",
    "mha": "gqa:hq=4,hkv=4,d=128,dtype=bf16",
    "gta": "gta:hq=8,hkv=2,d=128,rope=64,dtype=bf16",
    "window": "gqa:hq=8,hkv=2,d=128,dtype=bf16,layout=hnd,window=25",
    "mla": "mla:hq=16,d=512,rope=64,dtype=bf16,scale=0.07216878364870322",
    "gla": "gla:hq=16,hkv=2,d=256,rope=64,dtype=bf16,scale=0.07216878364870322",
}
SMALL = {
    "gqa": AttentionSpec.gqa(num_q_heads=6, num_kv_heads=2, head_dim=4),
    "gta": AttentionSpec.gta(num_q_heads=4, num_kv_heads=2, head_dim=8, rope_dim=4),
    "window": AttentionSpec.gqa(
        num_q_heads=2, num_kv_heads=1, head_dim=4, layout="HND", window=25, soft_cap=3.0
    ),
    "mla": AttentionSpec.mla(num_q_heads=4, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8),
    "gla": AttentionSpec.gla(
        num_q_heads=6, num_latent_heads=2, latent_dim=8, rope_dim=4, nope_dim=8
    ),
}


def of_kind(variant: str) -> list[str]:
    return LATENT if variant in ("mla", "gla") else HEADS


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flashinfer, "_library", lambda: fake_flashinfer)
    monkeypatch.setattr(flashinfer, "LATENT_WIDTHS", {8: "auto"})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its calls are tiny
    yield
    torch.set_num_threads(threads)


def check(name: str, gathered: Gathered, exact: Exact, bound: float) -> None:
    """Over the case's own caches and over copies of them."""
    call = FLASHINFER[name].make(gathered)
    for run in (call, call.over_a_copy()):
        out = FLASHINFER[name].ordered(gathered, run())
        assert out.shape == exact.out.shape
        assert out.dtype == gathered.q.dtype
        error = float((out.cpu().double() - exact.out).abs().max())
        assert error <= bound, f"{name}: {error}, expected at most {bound}"


@pytest.mark.parametrize("workload", SEEING)
@pytest.mark.parametrize("variant", SMALL)
def test_what_is_passed_to_flashinfer(stand_in: None, variant: str, workload: str) -> None:
    case = tensors(SEEING[workload], SMALL[variant])
    gathered, exact = Gathered(case), case.reference()
    for name in of_kind(variant):
        check(name, gathered, exact, exact.bound().out)


@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_caches_without_pages(stand_in: None, variant: str) -> None:
    case = tensors(ODD, SMALL[variant], contiguous=True)
    gathered, exact = Gathered(case), case.reference()
    for name in of_kind(variant):
        check(name, gathered, exact, exact.bound().out)


def sizes(levels: list[paged.Level]) -> list[list[tuple[int, int]]]:
    """Of each level rows and tokens of each request."""
    return [
        [
            (end - begin, len(tokens))
            for begin, end, tokens in zip(
                level.begins[:-1], level.begins[1:], level.tokens, strict=True
            )
        ]
        for level in levels
    ]


def test_levels_of_trees() -> None:
    def of(forest: Forest) -> Gathered:
        return Gathered(tensors(forest, SMALL["gqa"]))

    chain = of(parse("multi_step:root=60,levels=3,width=4,tokens=20").forest)
    assert sizes(paged.by_node(chain)) == [[(4, 100)], [(1, 20)] * 4]
    assert sizes(paged.by_prefix(chain)) == sizes(paged.by_node(chain))
    assert sizes(paged.by_sequence(chain)) == [[(1, 120)] * 4]
    assert paged.by_node(chain)[1].reads is None
    two = of(Forest.from_parents([-1, 0, 0, 1, 1], [5, 4, 3, 2, 1]))
    assert sizes(paged.by_node(two)) == [[(3, 5)], [(2, 4), (1, 3)], [(1, 2), (1, 1), (1, 1)]]
    uneven = paged.by_node(two)[2]
    assert uneven.reads is not None
    assert uneven.reads.tolist() == [True, True, False]
    assert sizes(paged.by_prefix(two)) == [[(3, 5)], [(1, 6), (1, 5), (1, 3)]]
    rows = of(Forest.from_parents([-1], [5], [3]))  # causal: 3, 4 and 5 tokens
    assert sizes(paged.by_node(rows)) == [[(1, 3), (1, 4), (1, 5)]]


def test_prefixes_share_full_pages() -> None:
    gathered = Gathered(
        tensors(parse("few_shot:prompt=40,branches=3,tokens=9").forest, SMALL["gqa"])
    )
    pages, (table,) = paged.paged(paged.by_sequence(gathered))
    # 49 tokens each: two pages of the prompt, and its rest with what a branch adds, in two more.
    assert pages.shape == (2 + 3 * 2, paged.PAGE)
    assert table.last_page_len.tolist() == [1, 1, 1]
    first = table.page_indices.view(3, 4)
    assert (first[:, :2] == first[0, :2]).all()
    assert first[:, 2:].unique().numel() == 6
    x = torch.randn(2, gathered.mask.shape[1], 4)
    kept = paged.cache(pages, x)
    assert kept.shape == (8, paged.PAGE, 2, 4)
    path = kept[first[1].long()].flatten(0, 1)[:49]
    assert torch.equal(path, x[:, gathered.seen[1]].transpose(0, 1))
    assert (kept[pages == paged.NO_TOKEN] == 0).all()


def test_what_flashinfer_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str, spec: AttentionSpec, forest: Forest = ODD) -> str | None:
        return FLASHINFER[name].lacks(Gathered(tensors(forest, spec)))

    large = {variant: AttentionSpec.parse(text) for variant, text in LARGE.items()}
    monkeypatch.setattr(flashinfer, "find_spec", lambda _: None)
    missing = "it needs FlashInfer (pip install flashinfer-python)"
    assert {lacks(name, large["gqa"]) for name in HEADS} == {missing}
    assert {lacks(name, large["mla"]) for name in LATENT} == {missing}
    monkeypatch.setattr(flashinfer, "find_spec", lambda _: True)
    assert lacks("flashinfer_decode", large["gqa"]) == (
        "it runs on cuda alone, the tensors are on cpu"
    )
    monkeypatch.setattr(flashinfer, "DEVICE", "cpu")
    for variant, spec in large.items():
        assert [lacks(name, spec) for name in of_kind(variant)] == [None] * len(of_kind(variant))
    assert lacks("flashinfer_levels", SMALL["gqa"]) == (
        "q, K and V are float32; it takes float16 or bfloat16"
    )
    assert lacks("flashinfer_decode", large["gqa"], BLIND) == (
        "a row sees nothing, which it does not know"
    )
    assert lacks("flashinfer_decode", large["mla"]) == "heads are 576 wide; it takes 64, 128, 256"
    latent = "it takes a latent of 512 or 256 columns that is K and V, and a rope of 64"
    assert lacks("flashinfer_mla", large["gqa"]) == latent
    assert lacks("flashinfer_mla", large["gta"]) == latent
    sinks = replace(large["gqa"], sinks=True)
    assert lacks("flashinfer_decode", sinks) == "it has no sinks"
    five = AttentionSpec.parse("gqa:hq=10,hkv=2,d=128,dtype=bf16")
    assert lacks("flashinfer_decode_cores", five) == (
        "5 query heads share a KV head; it takes 1, 2, 3, 4, 8"
    )
    monkeypatch.setattr(flashinfer, "MOST_TOKENS", 10)
    monkeypatch.setattr(flashinfer, "MOST_LATENT_REQUESTS", 10)
    monkeypatch.setattr(flashinfer, "MOST_MASKED", 10)
    assert lacks("flashinfer_prefix", large["gqa"]) == (
        "a buffer of its wrapper is too small for all paths"
    )
    assert lacks("flashinfer_mla", large["gla"]) == "its plan is too small for all rows"
    assert lacks("flashinfer_masked", large["gqa"]) == (
        f"its mask has {8 * 12 + 22 * 39} entries, and it numbers 10"
    )


def test_peers_do_not_import_flashinfer() -> None:
    code = "import sys, deft_tvm.peers; print('flashinfer' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.skipif(find_spec("flashinfer") is None, reason="there is no FlashInfer")
@pytest.mark.parametrize(
    "path",
    [
        f"{kind}.{method}"
        for kind in (
            "BatchDecodeWithPagedKVCacheWrapper",
            "BatchPrefillWithPagedKVCacheWrapper",
            "BatchMLAPagedAttentionWrapper",
        )
        for method in ("__init__", "plan", "run")
    ]
    + ["merge_state_in_place"],
)
def test_the_stand_in_has_the_arguments_of_flashinfer(path: str) -> None:
    ours, theirs = fake_flashinfer, importlib.import_module("flashinfer")
    for part in path.split("."):
        ours, theirs = getattr(ours, part), getattr(theirs, part)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    mine, real = (inspect.signature(x).parameters for x in (ours, theirs))
    assert set(mine) <= set(real)
    names = [name for name, parameter in mine.items() if parameter.kind in positional]
    assert names == list(real)[: len(names)]


on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flashinfer") is None,
    reason="there is no GPU, or no FlashInfer",
)


def rounded(exact: Exact, levels: int) -> float:
    """The bound of a kernel with 16-bit operands and results, and a result for each level's part
    and one for each merge, which are rounded as well; splits of a part are, too."""
    once = torch.finfo(torch.bfloat16).eps / 2 * exact.max_value
    return exact.bound("bfloat16", "bfloat16").out + 2 * levels * once


@on_gpu
@pytest.mark.parametrize("workload", list(SEEING)[:4])
@pytest.mark.parametrize("variant", LARGE)
def test_flashinfer_is_exact(variant: str, workload: str) -> None:
    case = tensors(SEEING[workload], AttentionSpec.parse(LARGE[variant]))
    exact, gathered = case.reference(), Gathered(case.to("cuda"))
    cuts = {"levels": paged.by_node, "prefix": paged.by_prefix}
    for name in of_kind(variant):
        assert FLASHINFER[name].lacks(gathered) is None
        cut = next((cut for word, cut in cuts.items() if word in name), paged.by_sequence)
        check(name, gathered, exact, rounded(exact, len(cut(gathered))))


@on_gpu
@pytest.mark.parametrize("name", FLASHINFER)
def test_flashinfer_in_a_graph(name: str) -> None:
    spec = AttentionSpec.parse(LARGE["mla" if name in LATENT else "gqa"])
    call = FLASHINFER[name].make(Gathered(tensors(ODD, spec).to("cuda")))
    expected = call().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
