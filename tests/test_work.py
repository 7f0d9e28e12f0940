"""In what order units and tokens are taken."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from tvm import sym, tirx

from deft_tvm.kernels.tokens import nth_token
from deft_tvm.kernels.work import TASKS_PER_THREAD, following, range_size
from deft_tvm.native import TORCH_POOL


def taken(units: int, threads: int) -> list[list[int]]:
    """Units of each thread in order, where ranges take equally long."""
    ranges = TASKS_PER_THREAD * threads if threads > 1 else 1
    size = -(-units // ranges)
    cut = [range(begin, min(begin + size, units)) for begin in range(0, units, size)]
    return [[unit for each in cut[thread::threads] for unit in each] for thread in range(threads)]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("units", [1, 2, 63, 64, 65, 200, 1000])
def test_the_next_unit_is_the_one_that_the_thread_takes_next(units: int, threads: int) -> None:
    simple = sym.Analyzer().simplify
    for own in taken(units, threads):
        found = [
            int(simple(following(unit, units, range_size(units, threads), threads))) for unit in own
        ]
        assert found[:-1] == own[1:]
        assert all(0 <= unit < units for unit in found)


def test_ranges_are_those_of_the_pool() -> None:
    (number,) = re.findall(r"TASKS_PER_THREAD = (\d+)", TORCH_POOL[0].read_text(encoding="utf-8"))
    assert int(number) == TASKS_PER_THREAD


@pytest.mark.parametrize("tile", [1, 2, 4, 8, 16, 32, 64, 48])
@pytest.mark.parametrize("scatter", [False, True])
def test_a_tile_has_each_of_its_tokens_once(tile: int, scatter: bool) -> None:
    """And no two steps from one to the next are alike where they are to be scattered."""
    simple = sym.Analyzer().simplify
    numbers = (nth_token(100, tirx.const(j, "int32"), tile, scatter) for j in range(tile))
    tokens = [int(simple(number)) for number in numbers]
    assert sorted(tokens) == list(range(100, 100 + tile))
    steps = [b - a for a, b in pairwise(tokens)]
    if scatter and tile & (tile - 1) == 0:
        assert all(a != b for a, b in pairwise(steps))
    else:
        assert set(steps) <= {1}
