"""DeFT-Flatten (Yao et al., ICLR 2025, section 3.3): the tree's KV flattened and cut evenly."""

from __future__ import annotations

from collections.abc import Iterator

from deft_tvm.peers.triton.plan import Plan, Tokens, Work
from deft_tvm.tree import Forest


def flatten(forest: Forest, group: int, chunk: int, lanes: int) -> Plan:
    """Every token once, in depth-first order, cut each `chunk` tokens across the borders of nodes.

    A chunk is read with all rows that see any of it, `lanes` lanes at a time; in place of the bit
    mask of the paper a token has the interval of rows that see it.
    """
    seen = forest.row_begin < forest.row_end
    tokens = Tokens.of_nodes(forest, forest.preorder[seen[forest.preorder]])
    return Plan.of(forest, tokens, _chunks(tokens, chunk, lanes), group)


def _chunks(tokens: Tokens, chunk: int, lanes: int) -> Iterator[Work]:
    for begin in range(0, len(tokens.number), chunk):
        end = min(begin + chunk, len(tokens.number))
        yield Work(begin, end, tokens.rows(begin, end), lanes)
