"""What the demo prints: one column for each dtype."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from deft_tvm.bench import OURS
from deft_tvm.commands.common import table
from deft_tvm.demo.job import Outcome
from deft_tvm.demo.model import Shape
from deft_tvm.demo.text import FewShot
from deft_tvm.device import DeviceProfile

CALLS = {
    OURS: "deft_tvm: plan, run, merge",
    "sequences": "SDPA sequence by sequence",
    "folded": "the same, group folded into rows",
    "batched": "the same, equal lengths in one call",
    "masked": "SDPA, one masked call over the tree",
}


def introduction(text: FewShot, shape: Shape, device: DeviceProfile) -> str:
    """What will be done, and where."""
    lengths = text.lengths
    return (
        f"{device.name}, {device.cores} cores ({device.slug})\n"
        f"The Declaration of Independence, byte by byte: a prompt of {len(text.prompt)}, "
        f"{len(lengths)} branches of {min(lengths)} to {max(lengths)}\n"
        f"A transformer of {shape.layers} layers with {shape.q_heads} query heads, "
        f"{shape.kv_heads} KV heads of width {shape.head_width}; its attention is deft_tvm's\n"
    )


def report(outcomes: Sequence[Outcome]) -> RenderableType:
    """Exactness, latency, traffic, and where things were written."""
    columns = ("", *(outcome.dtype for outcome in outcomes))
    return Group(
        table("largest errors", columns, _columns([_exactness(o) for o in outcomes])),
        table("\none attention step, ms", columns, _columns([_latency(o) for o in outcomes])),
        table("\nKV read in that step", columns, _columns([_traffic(o) for o in outcomes])),
        "",
        *(f"log     {outcome.log}\nmodule  {outcome.module}" for outcome in outcomes),
    )


def _exactness(found: Outcome) -> dict[str, str]:
    attention = found.attention
    return {
        "attention, from the float64 reference": f"{attention.out_error:.1e}",
        "    rounding explains": f"{attention.out_bound:.1e}",
        "logits, from those by SDPA": f"{found.logits_error:.1e}",
        "    rounding in attention explains": f"{found.logits_bound:.1e}",
        "": "exact" if found.holds else "NOT EXACT",
    }


def _latency(found: Outcome) -> dict[str, str]:
    timings, ratios = found.measurement.timings, found.measurement.speedups()
    return {
        call: f"{1e3 * timings[name].median:.2f}"
        + (f" ({ratios[name].median:.1f}×)" if name in ratios else "       ")
        for name, call in CALLS.items()
        if name in timings
    }


def _traffic(found: Outcome) -> dict[str, str]:
    traffic = found.measurement.traffic
    return {
        "as a tree, MiB": f"{traffic.tree.kv / 2**20:.1f}",
        "sequence by sequence, MiB": f"{traffic.sequence.kv / 2**20:.1f}",
        "saved": f"{traffic.kv_saved_percent:.1f} %",
    }


def _columns(cells: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    return [(name, *(cell[name] for cell in cells)) for name in cells[0]]
