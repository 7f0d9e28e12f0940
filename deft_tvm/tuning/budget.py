"""How many trials each kernel gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Key = TypeVar("Key")


def allot(
    trials: int, weights: Mapping[Key, float], made: Mapping[Key, int], most: Mapping[Key, int]
) -> dict[Key, int]:
    """Further trials of each kernel, so that all have `trials` together.

    They go one by one to the kernel with the most weight for a trial (the highest averages of
    D'Hondt), so that trials follow the share of time, and none gets more than it has decisions.

    Args:
        trials: that all kernels shall have, those made already included.
        weights: seconds that each kernel takes in the workload.
        made: trials that each has already.
        most: decisions that each has.
    """
    has = dict(made)
    for _ in range(trials - sum(made.values())):
        open_ = [key for key in weights if has[key] < most[key]]
        if not open_:
            break
        has[max(open_, key=lambda key: weights[key] / (has[key] + 1))] += 1
    return {key: has[key] - made[key] for key in weights}
