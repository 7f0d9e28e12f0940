# python benchmarks/variants.py
"""What variants gain: one sequence of 65,536 tokens, and trees on which they want other plans."""

from __future__ import annotations

import torch

from deft_tvm import AttentionSpec, Forest, TreeAttention
from deft_tvm.timing import Timing, measure
from deft_tvm.workloads import parse, tensors

BUDGET = 8.0
COLD_BYTES = 64 << 20
"""Read between calls whose KV a cache could hold, so that none finds what another left there."""


def timings(
    forest: Forest,
    specs: dict[str, AttentionSpec],
    groupings: tuple[str, ...] = ("auto",),
    planning: bool = True,
    cold_bytes: int = 0,
) -> tuple[dict[tuple[str, str], Timing], dict[tuple[str, str], TreeAttention]]:
    """One run of each spec and grouping in turn, with its plan unless a step plans for many."""
    calls, attentions = {}, {}
    for name, spec in specs.items():
        case = tensors(forest, spec)
        for grouping in groupings:
            attention = TreeAttention(spec, grouping=grouping)
            attention.plan(case.forest, case.pages)
            out, lse = attention.run(case.q, case.kv)

            def call(attention=attention, case=case, out=out, lse=lse) -> None:
                if planning:
                    attention.plan(case.forest, case.pages)
                attention.run(case.q, case.kv, out, lse)

            calls[f"{name} {grouping}"] = call
            attentions[name, grouping] = attention
    with torch.inference_mode():
        found = measure(calls, budget=BUDGET, cold_bytes=cold_bytes)
    return dict(zip(attentions, found.values(), strict=True)), attentions


def compare(title: str, forest: Forest, specs: dict[str, AttentionSpec]) -> None:
    """KV bytes and milliseconds, beside those of the first spec."""
    print(f"\n{title}")
    found, attentions = timings(forest, specs)
    first = next(iter(found))
    base = attentions[first].traffic.tree.kv
    for key, timing in found.items():
        kv = attentions[key].traffic.tree.kv
        ratio = 1 / timing.speedup(found[first]).median
        print(
            f"{key[0]:28}{kv / 2**20:9.1f} MiB of KV, {kv / base:.2f}×"
            f"{1e3 * timing.median:10.2f} ms, {ratio:.2f}×"
        )


def choose(title: str, forest: Forest, specs: dict[str, AttentionSpec]) -> None:
    """What `auto` picks, beside sharing every node and sharing nothing; the run alone."""
    print(f"\n{title}")
    groupings = ("auto", "node", "sequence")
    found, attentions = timings(forest, specs, groupings, planning=False, cold_bytes=COLD_BYTES)
    for name in specs:
        times = (f"{grouping} {1e3 * found[name, grouping].median:.2f}" for grouping in groupings)
        traffic = attentions[name, "auto"].traffic
        print(f"{name:28}{', '.join(times)} ms; auto saves {traffic.kv_saved_percent:.0f} % of KV")


HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
LATENT = {"rope_dim": 64, "nope_dim": 128}
MLA = AttentionSpec.gla(num_q_heads=16, num_latent_heads=1, latent_dim=512, **LATENT)
GLA = AttentionSpec.gla(num_q_heads=16, num_latent_heads=2, latent_dim=256, **LATENT)

if __name__ == "__main__":
    long = parse("long").forest
    compare(
        "one row, 65,536 tokens, 32 query heads, float32",
        long,
        {"GQA-8": AttentionSpec.gqa(**HEADS), "GTA-8": AttentionSpec.gta(**HEADS, rope_dim=64)},
    )
    compare(
        "one row, 16,384 tokens, 16 query heads, latents of 512 elements in all, float32",
        parse("long:tokens=16384").forest,
        {
            "MLA": MLA,
            "GLA-2": GLA,
            "MLA, one of 2 devices": MLA.shard(0, 2),
            "GLA-2, one of 2 devices": GLA.shard(0, 2),
        },
    )
    choose(
        "a prompt of 1,024 and eight branches of 64, bfloat16",
        parse("few_shot:prompt=1024,branches=8,tokens=64").forest,
        {
            "GQA, 32 heads over 8": AttentionSpec.gqa(**HEADS, dtype="bfloat16"),
            "MLA, 128 heads": AttentionSpec.mla(
                num_q_heads=128,
                kv_lora_rank=512,
                qk_rope_head_dim=64,
                qk_nope_head_dim=128,
                dtype="bfloat16",
            ),
        },
    )
    compare(
        "one row, 65,536 tokens, 32 query heads over 8",
        long,
        {
            "bfloat16": AttentionSpec.gqa(**HEADS, dtype="bfloat16"),
            "KV in 8 bits": AttentionSpec.gqa(**HEADS, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
        },
    )
