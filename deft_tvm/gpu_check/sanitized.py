"""``python -m deft_tvm.gpu_check.sanitized --spec SPEC``: every kernel of a module, once or more.

What `sanitize` runs under NVIDIA's tools: small trees, one after another until their plans have
launched all tile classes and the merge.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

# Each tensor by itself, so that what is out of its bounds is in nobody's: before torch is imported.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

from deft_tvm.gpu_check.arguments import kind_of, parser_of
from deft_tvm.gpu_check.cells import forest_of
from deft_tvm.plan import Plan
from deft_tvm.pytorch import TreeAttention
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tree import Forest
from deft_tvm.tuning.subject import MERGE
from deft_tvm.workloads import tensors

TREES = ("uneven_trees", "several_rows", "empty_nodes", "few_shot:prompt=300,branches=5,tokens=9")


def main() -> None:
    """Run all kernels of a module; exits with 2 if one was not launched by any plan."""
    parser = parser_of(__doc__)
    parser.add_argument("--spec", required=True)
    asked = parser.parse_args()
    missing = run_all(AttentionSpec.parse(asked.spec), kind_of(asked))
    if missing:
        print(f"not launched: {', '.join(missing)}")
        sys.exit(2)


def run_all(spec: AttentionSpec, kind: str) -> list[str]:
    """Run until all kernels have; the names of those that did not."""
    attention = TreeAttention(spec, device=kind)
    wanted = {*(tile.name for tile in attention.artifact.tiles), MERGE}
    for forest, deterministic in forests(spec.group, attention.artifact.tiles):
        attention.deterministic = deterministic
        # Made there, they would bring torch's kernels along.
        case = tensors(forest, spec).to(kind)
        plan = attention.plan(forest, case.pages)
        attention.run(case.q, case.kv, sinks=case.sinks)
        print(f"{forest}: {', '.join(sorted(launched(plan)))}", flush=True)
        wanted -= launched(plan)
        if not wanted:
            break
    return sorted(wanted)


def forests(group: int, tiles: Sequence[TileShape]) -> Iterator[tuple[Forest, bool]]:
    """Trees, and whether to plan them deterministically.

    First some of all kinds, then for each tile class one with as many rows as it holds: planned so,
    they take the smallest class that holds them, whatever it costs.
    """
    for name in TREES:
        yield forest_of(name), False
    for tile in tiles:
        rows = max(1, tile.lane_rows // group)
        lengths = [500, *[1 + place % 9 for place in range(rows)]]
        yield Forest.from_parents([-1] + [0] * rows, lengths), True


def launched(plan: Plan) -> set[str]:
    """Names of the kernels that a plan runs."""
    return {plan.tiles[tile].name for tile, _, _ in plan.launches} | (
        {MERGE} if len(plan.merge_rows) else set()
    )


if __name__ == "__main__":
    main()
