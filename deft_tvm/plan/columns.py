"""Columns of a plan's two tables, by which planners write them and kernels read them.

``native/plan_buffer.h`` numbers them, too. What each holds is told by `Plan.runs` and `Plan.items`.
"""

from __future__ import annotations

from enum import IntEnum

HEADER = 8
COLUMNS = 7
"""Of a header, and of each run and item."""


class Run(IntEnum):
    """Of `Plan.runs`."""

    OFFSET = 0
    PAGE_BEGIN = 1
    FIRST_SLOT = 2
    ROW_BEGIN = 3
    ROW_END = 4
    DIAGONAL = 5
    POSITION = 6


class Item(IntEnum):
    """Of `Plan.items`."""

    ROW_BEGIN = 0
    NUM_ROWS = 1
    RUN_BEGIN = 2
    RUN_END = 3
    NUM_TOKENS = 4
    DEST_BEGIN = 5
    LAST_POSITION = 6
