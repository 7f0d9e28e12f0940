"""Measure cells one after another, each with everything that is recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from deft_tvm import workloads
from deft_tvm.bench.core import Cell
from deft_tvm.bench.measure import OTHERS, Measurement, measure
from deft_tvm.limit import Limit
from deft_tvm.peers import PEERS
from deft_tvm.spec import AttentionSpec
from deft_tvm.workloads import tensors


def run(
    cells: Iterable[Cell],
    peers: Iterable[str] = tuple(PEERS),
    *,
    budget: float = 4.0,
    say: Callable[[str], None],
) -> Iterator[Measurement]:
    """Each cell beside all `peers`, the paper's groupings and matrix products.

    Caches are emptied before each call where the cell's KV is more than a core's second-level
    cache: then a model of many layers would not find it there.
    """
    from deft_tvm.pytorch import TreeAttention

    peers = tuple(peers)
    for cell in cells:
        spec, workload = AttentionSpec.parse(cell.spec), workloads.parse(cell.workload)
        title = f"{workload.name}, {cell.spec}"

        def tell(text: str, title: str = title) -> None:
            say(f"{title}: {text}")

        tell("taking the best module, or building the default")
        attention = TreeAttention(spec)
        tell("random tensors")
        case = tensors(workload.forest, spec)
        yield measure(
            workload.name,
            case,
            attention,
            peers,
            budget=budget,
            cold=Limit.of(case.forest, spec).num_bytes > attention.profile.l2_bytes,
            groupings=OTHERS,
            between=True,
            say=tell,
        )
