"""Forests against a recursive reading of what a tree is."""

from __future__ import annotations

import dataclasses
import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deft_tvm import arrays, tree
from deft_tvm.errors import TreeError
from deft_tvm.tree import Forest

MANY = 20_000


@st.composite
def forests(draw):
    """Parents, lengths and rows of up to 12 nodes, numbered in any order."""
    count = draw(st.integers(0, 12))
    place = draw(st.permutations(range(count)))
    parents, lengths, rows = [-1] * count, [0] * count, [0] * count
    for k in range(count):
        above = draw(st.integers(-1, k - 1))
        parents[place[k]] = -1 if above < 0 else place[above]
        lengths[place[k]] = draw(st.integers(0, 5))
        rows[place[k]] = draw(st.integers(0, lengths[place[k]] or 3))
    return parents, lengths, rows


def path_to(parents, node):
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


def preorder(parents, node=-1):
    below = [n for n, parent in enumerate(parents) if parent == node]
    return [node] * (node >= 0) + [m for n in below for m in preorder(parents, n)]


def tokens_seen(parents, lengths, rows):
    """For each row of the caller the tokens (node, place) of its ancestors, and up to itself."""
    seen = []
    for node, count in enumerate(rows):
        above = {(n, p) for n in path_to(parents, parents[node]) for p in range(lengths[n])}
        for last in range(lengths[node] - count, lengths[node]):
            seen.append(above | {(node, p) for p in range(last + 1)})
    return seen


def tokens_masked_in(forest):
    """The same from the intervals of preorder rows."""
    seen = [set() for _ in range(forest.num_rows)]
    for n in range(forest.num_nodes):
        for p in range(forest.lengths[n]):
            begin = forest.row_begin[n] + max(0, p - forest.diagonal[n])
            for row in forest.row_order[begin : forest.row_end[n]]:
                seen[row].add((n, p))
    return seen


def arrays_of(forest):
    values = {f.name: getattr(forest, f.name) for f in dataclasses.fields(forest)}
    return {name: value for name, value in values.items() if name != "is_part"}


@given(forests())
def test_intervals_are_the_mask(nodes):
    assert tokens_masked_in(Forest.from_parents(*nodes)) == tokens_seen(*nodes)


@given(forests(), st.data())
def test_rows_of_bidirectional_nodes_see_their_node_whole(nodes, data):
    parents, lengths, rows = nodes
    whole = data.draw(st.lists(st.booleans(), min_size=len(parents), max_size=len(parents)))
    wanted = tokens_seen(*nodes)
    owner = [node for node, count in enumerate(rows) for _ in range(count)]
    for row, node in enumerate(owner):
        if whole[node]:
            wanted[row] |= {(node, p) for p in range(lengths[node])}
    forest = Forest.from_parents(*nodes, bidirectional=np.array(whole, bool))
    assert tokens_masked_in(forest) == wanted
    assert forest.same_topology(Forest.from_parents(*nodes)) == (not any(whole))


def test_bidirectional_is_one_bool_a_node():
    for given_, described in (
        ([1, 0], "int64 of shape \\(2,\\)"),
        ([True], "bool of shape \\(1,\\)"),
    ):
        with pytest.raises(TreeError, match=f"bidirectional is {described}; expected one bool for"):
            Forest.from_parents([-1, 0], [3, 2], bidirectional=given_)


@given(forests())
def test_preorder_levels_and_starts(nodes):
    parents, lengths, _ = nodes
    forest = Forest.from_parents(*nodes)
    assert forest.preorder.tolist() == preorder(parents)
    assert forest.preorder[forest.position].tolist() == list(range(len(parents)))
    for n in range(len(parents)):
        above = path_to(parents, parents[n])
        assert forest.level[n] == len(above)
        assert forest.start[n] == sum(lengths[m] for m in above)
        assert forest.diagonal[n] == max(0, lengths[n] - nodes[2][n])
        subtree = forest.preorder[forest.position[n] : forest.subtree_end[n]].tolist()
        assert subtree == preorder(parents, n)


@given(forests())
def test_rows_are_at_the_last_tokens_of_their_nodes(nodes):
    """Those of a node of length 0 are all where the path above it ends."""
    parents, lengths, rows = nodes
    forest = Forest.from_parents(*nodes)
    found = np.empty(forest.num_rows, np.int32)
    found[forest.row_order] = forest.row_positions
    wanted = []
    for node, count in enumerate(rows):
        end = sum(lengths[n] for n in path_to(parents, node))
        wanted += range(end - count, end) if lengths[node] else [end - 1] * count
    assert found.tolist() == wanted


@given(forests(), st.data())
def test_with_lengths_is_a_new_forest_that_shares_the_topology(nodes, data):
    parents, lengths, rows = nodes
    grown = [n + data.draw(st.integers(0, 9)) if n else 0 for n in lengths]
    forest = Forest.from_parents(*nodes)
    longer = forest.with_lengths(grown)
    for name, array in arrays_of(Forest.from_parents(parents, grown, rows)).items():
        assert np.array_equal(getattr(longer, name), array), name
        if name not in ("lengths", "start", "diagonal"):
            assert getattr(longer, name) is getattr(forest, name)
    assert longer.same_topology(forest)


def test_same_topology_compares_parents_and_rows():
    forest = Forest.from_parents([-1, 0], [3, 2], [1, 1])
    assert forest.same_topology(Forest.from_parents([-1, 0], [9, 9], [1, 1]))
    assert not forest.same_topology(Forest.from_parents([-1, 0], [3, 2], [0, 1]))
    assert not forest.same_topology(Forest.from_parents([-1, -1], [3, 2], [1, 1]))


def test_arrays_are_int32_copies_that_cannot_be_written():
    parents = np.array([-1, 0], np.int64)
    forest = Forest.from_parents(parents, [4, 2])
    parents[1] = -1
    assert forest.parents.tolist() == [-1, 0]
    for name, array in {**arrays_of(forest), "level": forest.level}.items():
        assert array.dtype == np.int32 and array.flags.c_contiguous, name
        with pytest.raises(ValueError, match="read-only"):
            array[:1] = 7


def test_default_rows_are_one_at_each_leaf():
    forest = Forest.from_parents([-1, 0, 0, -1, 1], [4, 2, 0, 3, 1])
    assert forest.rows.tolist() == [0, 0, 1, 1, 1]


def test_repr_counts():
    text = "Forest(nodes=5, trees=2, levels=3, tokens=10, rows=3)"
    assert repr(Forest.from_parents([-1, 0, 0, -1, 1], [4, 2, 0, 3, 1])) == text
    assert (
        repr(Forest.from_parents([], [])) == "Forest(nodes=0, trees=0, levels=0, tokens=0, rows=0)"
    )


def test_chain_of_many_nodes():
    """Numbered from the leaf up, so that no parent comes before its child."""
    forest = Forest.from_parents([*range(1, MANY), -1], np.full(MANY, 3), np.ones(MANY, int))
    down = np.arange(MANY)[::-1]
    assert np.array_equal(forest.preorder, down)
    assert np.array_equal(forest.start, 3 * down)
    assert np.array_equal(forest.row_begin, down)
    assert (forest.row_end == MANY).all() and (forest.subtree_end == MANY).all()
    assert np.array_equal(forest.row_order, down)


def test_star_of_many_leaves():
    forest = Forest.from_parents([-1] + [0] * MANY, [7] + [2] * MANY)
    assert np.array_equal(forest.preorder, np.arange(MANY + 1))
    assert (forest.start[1:] == 7).all() and forest.level.max() == 1
    assert forest.row_begin[0] == 0 and forest.row_end[0] == MANY
    assert np.array_equal(forest.row_begin[1:], np.arange(MANY))


def test_same_input_same_arrays():
    one, other = (Forest.from_parents([2, 2, -1, 0, 0], [1, 2, 3, 4, 5]) for _ in range(2))
    for name, array in arrays_of(one).items():
        assert np.array_equal(array, getattr(other, name))


@pytest.mark.parametrize(
    ("parents", "lengths", "rows", "text"),
    [
        ([-1, 2, 1], [1, 1, 1], None, r"parents has a cycle through node [12]; expected every"),
        ([0], [1], None, r"parents has a cycle through node 0"),
        ([-1, 4, 3, 4, 3], [1] * 5, None, r"parents has a cycle through node [34];"),
        (
            [-1, 2],
            [1, 1],
            None,
            r"parents\[1\] is 2; expected -1 for a root, or a node from 0 to 1",
        ),
        ([-2, 0], [1, 1], None, r"parents\[0\] is -2; expected -1"),
        ([-1, 0], [1], None, r"lengths has 1 entries; expected 2"),
        ([-1, 0], [1, 1], [1], r"rows has 1 entries; expected 2"),
        ([-1, 0], [1, -3], [0, 0], r"lengths\[1\] is -3; expected 0 or more"),
        ([-1, 0], [1, 1], [0, -1], r"rows\[1\] is -1; expected 0 or more"),
        ([-1, 0], [5, 2], [0, 3], r"rows\[1\] is 3; expected at most lengths\[1\], which is 2"),
        ([-1, 0], [1.5, 2], None, r"lengths is float64 of shape \(2,\); expected integers"),
        ([[-1, 0]], [1, 2], None, r"parents is int64 of shape \(1, 2\); expected integers"),
        ([-1, 0], [1, 2**31], None, r"lengths\[1\] is 2147483648; expected what fits 32 bits"),
        ([-1, 0], [2**30, 2**30], None, r"lengths add up to 2147483648; expected less than 2\^31"),
    ],
)
def test_refusals_of_parents(parents, lengths, rows, text):
    with pytest.raises(TreeError, match=text):
        Forest.from_parents(parents, lengths, rows)


def test_refusals_of_new_lengths():
    forest = Forest.from_parents([-1, 0], [3, 2], [0, 2])
    with pytest.raises(TreeError, match=r"lengths has 3 entries; expected 2"):
        forest.with_lengths([1, 2, 3])
    with pytest.raises(TreeError, match=r"rows\[1\] is 2; expected at most lengths\[1\]"):
        forest.with_lengths([3, 1])


token_lists = st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=8)


@given(token_lists)
def test_branches_are_found_again(branches):
    forest, ends = Forest.from_branches(branches)
    assert forest.num_nodes - len(branches) == min(ends, default=0)
    text = {}
    for b, end in enumerate(ends):
        for n in path_to(forest.parents, end):
            begin = forest.start[n]
            own = branches[b][begin : begin + forest.lengths[n]]
            assert text.setdefault(n, own) == own
        assert sum(forest.lengths[path_to(forest.parents, end)]) == len(branches[b])
    assert len(text) == forest.num_nodes
    assert np.array_equal(forest.rows[ends], np.ones(len(branches)))
    assert forest.num_rows == len(branches) and (np.diff(ends) == 1).all()


@given(token_lists)
def test_branches_share_all_they_can(branches):
    """As many tokens as there are different prefixes."""
    forest, _ = Forest.from_branches(branches)
    prefixes = {tuple(branch[:n]) for branch in branches for n in range(1, len(branch) + 1)}
    assert forest.num_tokens == len(prefixes)


def test_equal_branches_have_a_row_each():
    forest, ends = Forest.from_branches([[4, 4], [4, 4], [4], [4, 4]])
    assert forest.parents.tolist() == [2, 0, -1, 1]
    assert forest.lengths.tolist() == [1, 0, 1, 0]
    assert ends.tolist() == [0, 1, 2, 3]
    forest, _ = Forest.from_branches([[4, 4]] * 100)
    assert forest.parents.tolist() == [*range(-1, 99)], "each below the one before it"


@pytest.mark.parametrize(
    ("branches", "text"),
    [
        ([[1], [2, -5]], r"branches\[1\]\[1\] is -5; expected 0 or more"),
        ([[1], [2.5]], r"branches\[1\] is float64 of shape \(1,\); expected integers"),
        (np.zeros(3, int), r"branches has shape \(3,\); expected two dimensions"),
        (np.zeros((3, 2, 1), int), r"branches has shape \(3, 2, 1\); expected two dimensions"),
    ],
)
def test_refusals_of_branches(branches, text):
    with pytest.raises(TreeError, match=text):
        Forest.from_branches(branches)


def test_choices_in_any_order_keep_it():
    forest = Forest.from_choices([(0, 1, 0), (1,), (0,), (0, 1)], 9)
    assert forest.parents.tolist() == [-1, 4, 0, 0, 3]
    assert forest.lengths.tolist() == [9, 1, 1, 1, 1]
    assert forest.rows.tolist() == [1, 1, 1, 1, 1]
    assert forest.diagonal[0] == 8  # the root's own row and all drafts see the context


def test_choices_without_the_row_of_the_root():
    forest = Forest.from_choices([[0], [1]], 0, root_row=False)
    assert forest.lengths.tolist() == [0, 1, 1] and forest.rows.tolist() == [0, 1, 1]


def test_choices_under_several_contexts():
    forest = Forest.from_choices([(0,), (0, 0)], [5, 8])
    assert forest.parents.tolist() == [-1, 0, 1, -1, 3, 4]
    assert forest.lengths.tolist() == [5, 1, 1, 8, 1, 1]
    assert forest.start.tolist() == [0, 5, 6, 0, 8, 9]


@pytest.mark.parametrize(
    ("choices", "context", "text"),
    [
        ([(0,), (1, 0)], 4, r"choices\[1\] is \(1, 0\); expected its prefix \(1,\) as a choice"),
        ([(0,), (0,)], 4, r"choices\[0\] is \(0,\); expected every path once"),
        ([(0,), ()], 4, r"choices\[1\] is \(\); expected every path once, none of them empty"),
        ([(0,)], 0, r"context is 0; expected 1 or more, as its last token has a row"),
    ],
)
def test_refusals_of_choices(choices, context, text):
    with pytest.raises(TreeError, match=text):
        Forest.from_choices(choices, context)


def test_examples_in_docstrings():
    for module in (arrays, tree):
        done = doctest.testmod(module)
        assert done.attempted and not done.failed
