# python benchmarks/core.py logs/amd-epyc-avx512bf16-2c/benchmarks/core.jsonl
"""The document and the drawing of a record that ``deft-tvm bench core --out`` left."""

from __future__ import annotations

import sys
from pathlib import Path

from deft_tvm.bench import plot, report
from deft_tvm.bench.record import Record
from deft_tvm.peers import PEERS


def document(record: Record, drawing: str) -> str:
    """All cells in Markdown, what is behind the columns, and the losses."""
    origin, found = record.origin, record.measurements
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    pages, setting = (", huge pages", "THP_MEM_ALLOC_ENABLE=1 ") if origin.huge_pages else ("", "")
    parts = [
        "# The core set\n",
        f"{origin.name} ({origin.device}), {origin.threads} threads, {origin.date}, "
        f"commit {origin.commit}, {versions}{pages}. Made by `{setting}deft-tvm bench core --out "
        "core.jsonl` and `python benchmarks/core.py core.jsonl`.\n",
        *(f"- {line}" for line in report.summary(found)),
        f"\n![each cell beside its fastest peer and the limit]({drawing})\n",
        "## Speed\n",
        "Ours counts one full plan for each call. The limit is the larger of the KV that rows see "
        "over the read bandwidth and the products over the matrix rate, both probed in the same "
        "rounds.\n",
        report.markdown(report.SPEED, report.speed(found)),
        "## Where the time goes\n",
        "Microseconds; *plan / layers* is what a call of a model with "
        f"{report.LAYERS} layers bears of it. *between* is the time between two matrix products "
        "over the time alone.\n",
        report.markdown(report.PARTS, report.parts(found)),
        "## Other groupings\n",
        "One run by the plan that was chosen, in milliseconds, and times as long by the plans of "
        "DeFT's three groupings, of no sharing, and of packing by cost; one that was hopeless was "
        "run once.\n",
        report.markdown(report.GROUPED, report.grouped(found)),
        "## All peers\n",
        "Milliseconds. Of the peers KV is gathered beforehand and not counted.\n",
        report.markdown(("workload", "attention", *PEERS), report.peers(found, tuple(PEERS))),
        *(f"- {name}: {peer.setting}" for name, peer in PEERS.items()),
        "\nvLLM's CPU attention and llama.cpp are not among them: neither comes as a package that "
        "could be called on these tensors.",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    kept = Record.read(path)
    plot.core(kept.measurements, path.with_suffix(".svg"))
    text = document(kept, path.with_suffix(".svg").name)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
