"""Page tables against a dictionary of slots."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deft_tvm import pages
from deft_tvm.errors import PageError, TreeError
from deft_tvm.pages import PageTable
from deft_tvm.tree import Forest

PAIR = Forest.from_parents([-1, 0], [6, 3])


@st.composite
def tables(draw):
    """Nodes with pages drawn from so few that they often clash."""
    size = draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(0, 5))
    lengths = draw(st.lists(st.integers(0, 7), min_size=count, max_size=count))
    first = draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    held = [
        -(-(slot + n) // size) + draw(st.integers(0, 1))
        for slot, n in zip(first, lengths, strict=True)
    ]
    indices = draw(st.lists(st.integers(0, 40), min_size=sum(held), max_size=sum(held)))
    return lengths, indices, np.cumsum([0, *held]), first, size


def slots_of(lengths, indices, indptr, first, size):
    """The (page, slot) of every token."""
    places = (divmod(first[n] + t, size) for n, length in enumerate(lengths) for t in range(length))
    nodes = (n for n, length in enumerate(lengths) for _ in range(length))
    return [
        (indices[indptr[n] + page], slot) for n, (page, slot) in zip(nodes, places, strict=True)
    ]


@given(tables())
def test_a_table_is_good_when_every_token_has_its_own_slot(drawn):
    lengths, indices, indptr, first, size = drawn
    table = PageTable(indices, indptr, first, page_size=size)
    forest = Forest.from_parents([-1] * len(lengths), lengths)
    slots = slots_of(*drawn)
    if len(set(slots)) == len(slots):
        table.check(forest)
    else:
        with pytest.raises(PageError, match=r"in overlapping slots; expected a slot for each"):
            table.check(forest)


@given(tables(), st.lists(st.integers(0, 7), min_size=5, max_size=5))
def test_a_table_that_was_checked_answers_as_a_new_one(drawn, others):
    """Lengths that fit the room left by those before are not looked at again."""
    lengths, indices, indptr, first, size = drawn
    used = PageTable(indices, indptr, first, page_size=size)

    def answer(table, lengths):
        try:
            table.check(Forest.from_parents([-1] * len(lengths), lengths))
        except PageError as error:
            return str(error)
        return "fits"

    for tried in (lengths, others[: len(lengths)], lengths):
        new = PageTable(indices, indptr, first, page_size=size)
        assert answer(used, tried) == answer(new, tried)


def test_a_node_may_grow_up_to_the_next_one_in_its_page():
    table = PageTable([5, 5], [0, 1, 2], [0, 2], page_size=4)
    forest = Forest.from_parents([-1, -1], [1, 1])
    table.check(forest)
    assert table.room.lengths.tolist() == [2, 2]
    table.check(forest.with_lengths([2, 2]))
    with pytest.raises(PageError, match="page 5 is shared by nodes 0 and 1 in overlapping slots"):
        table.check(forest.with_lengths([3, 1]))


def test_attributes():
    table = PageTable([4, 9, 4], np.array([0, 2, 3]), page_size=16)
    assert table.first_slot.tolist() == [0, 0]
    assert (table.num_nodes, table.page_shift, table.max_page) == (2, 4, 9)
    assert not table.is_contiguous
    assert repr(table) == "PageTable(nodes=2, pages=3, page_size=16)"
    for array in (table.page_indices, table.page_indptr, table.first_slot):
        assert array.dtype == np.int32 and not array.flags.writeable


def test_no_nodes_no_pages():
    table = PageTable([], [0], page_size=16)
    table.check(Forest.from_parents([], []))
    assert table.max_page == -1


def test_contiguous_is_one_page():
    forest = Forest.from_parents([1, -1, 1], [3, 5, 0])
    table = PageTable.contiguous(forest)
    table.check(forest)
    assert table.page_indices.tolist() == [0] and table.page_shift == 30
    assert table.page_indptr.tolist() == [0, 0, 0, 0]
    assert table.first_slot.tolist() == [0, 3, 8]
    assert table.is_contiguous and repr(table) == "PageTable.contiguous(nodes=3)"


def test_a_contiguous_table_is_for_its_lengths_alone():
    table = PageTable.contiguous(PAIR)
    with pytest.raises(PageError, match=r"first_slot\[1\] is 6, but the nodes before it have 7"):
        table.check(PAIR.with_lengths([7, 3]))
    with pytest.raises(PageError, match=r"forest has 1073741825 tokens; expected at most 2\^30"):
        PageTable.contiguous(PAIR.with_lengths([2**30, 1]))
    most = PAIR.with_lengths([2**30 - 1, 1])
    PageTable.contiguous(most).check(most)


def test_branches_may_go_on_in_the_middle_of_a_page():
    forest = Forest.from_parents([-1, 0, 0], [6, 3, 1])
    PageTable([8, 3, 3, 5, 5], [0, 2, 4, 5], [0, 2, 1], page_size=4).check(forest)


def sequence_slots(blocks, length, size):
    return [(blocks[t // size], t % size) for t in range(length)]


def path_slots(forest, node, slots, begins):
    if node < 0:
        return []
    own = slots[begins[node] : begins[node] + forest.lengths[node]]
    return path_slots(forest, forest.parents[node], slots, begins) + own


@st.composite
def serving_batches(draw):
    """Tables of a prefix cache: a block's number tells all blocks before it."""
    size = draw(st.sampled_from([1, 2, 4]))
    number: dict[tuple[int, ...], int] = {}
    tables, lengths = [], []
    for names in draw(st.lists(st.lists(st.integers(0, 1), max_size=4), max_size=6)):
        keys = [tuple(names[: k + 1]) for k in range(len(names))]
        tables.append([number.setdefault(key, len(number)) for key in keys])
        lengths.append(draw(st.integers(0, size * len(names))))
    return tables, lengths, size


@given(serving_batches())
def test_block_tables_are_found_again(batch):
    tables, lengths, size = batch
    forest, indices, indptr, first = Forest.from_block_tables(*batch)
    PageTable(indices, indptr, first, page_size=size).check(forest)
    node_slots = slots_of(forest.lengths, indices, indptr, first, size)
    begins = np.cumsum(forest.lengths) - forest.lengths
    wanted = [sequence_slots(table, n, size) for table, n in zip(tables, lengths, strict=True)]
    for end, expected in enumerate(wanted, start=forest.num_nodes - len(tables)):
        assert path_slots(forest, end, node_slots, begins) == expected
    assert forest.num_tokens == len({slot for one in wanted for slot in one})
    assert forest.num_rows == len(tables)


def test_sequences_of_the_same_blocks_go_on_one_from_the_other():
    """The shorter one first, of lengths of any number of bytes too."""
    blocks = list(range(32))
    forest, indices, indptr, first = Forest.from_block_tables([blocks] * 3, [256, 255, 256], 16)
    assert forest.parents.tolist() == [1, -1, 0] and forest.lengths.tolist() == [1, 255, 0]
    assert indptr.tolist() == [0, 1, 17, 17] and first.tolist() == [15, 0, 0]
    assert indices.tolist() == [15, *range(16)]
    *_, indptr, _ = Forest.from_block_tables([[7]] * 2, [3, 3], 16)
    assert indptr.tolist() == [0, 1, 1], "no page for no tokens"


def test_block_tables_may_be_a_padded_matrix():
    table = np.array([[3, 4, 5], [3, 4, 6], [9, -1, -1]])
    forest, indices, indptr, first = Forest.from_block_tables(table, [9, 10, 2], 4)
    assert forest.parents.tolist() == [-1, 0, 0, -1]
    assert forest.lengths.tolist() == [8, 1, 2, 2]
    assert indices.tolist() == [3, 4, 5, 6, 9]
    assert indptr.tolist() == [0, 2, 3, 4, 5]
    assert first.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tables", "lengths", "size", "text"),
    [
        ([[1, 2], [3]], [8, 5], 4, r"block_tables\[1\] holds 1 blocks of 4 tokens; expected room"),
        ([[1, -1]], [5], 4, r"block_tables\[0\]\[1\] is -1; expected 0 or more"),
        ([[1], [2]], [1], 4, r"seq_lens has 1 entries; expected 2"),
        ([[1]], [-1], 4, r"seq_lens\[0\] is -1; expected 0 or more"),
        ([[1]], [1], 0, r"page_size is 0; expected 1 or more"),
    ],
)
def test_refusals_of_block_tables(tables, lengths, size, text):
    with pytest.raises(TreeError, match=text):
        Forest.from_block_tables(tables, lengths, size)


def test_block_tables_make_a_good_table():
    forest, *arrays = Forest.from_block_tables([[1, 2], [1, 2, 3], [1, 4]], [6, 11, 7], 4)
    table = PageTable(*arrays, page_size=4)
    table.check(forest)
    assert table.page_indices.tolist() == [1, 2, 2, 3, 4]
    assert table.first_slot.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize(
    ("indices", "indptr", "first", "size", "text"),
    [
        ([1], [0, 1], None, 12, r"page_size is 12; expected a power of two"),
        ([1], [0, 1], None, 0, r"page_size is 0; expected a power of two"),
        ([1, -7], [0, 2], None, 4, r"page_indices\[1\] is -7; expected 0 or more"),
        ([1], [], None, 4, r"page_indptr is empty; expected one entry more"),
        ([1, 2], [0, 2, 1], None, 4, r"page_indptr\[2\] is 1, after 2; expected it not to fall"),
        ([1, 2], [0, 3], None, 4, r"page_indptr goes from 0 to 3; expected it within page_indices"),
        ([1, 2], [-1, 2], None, 4, r"page_indptr goes from -1 to 2; expected it within"),
        ([1, 2], [0, 2], [4], 4, r"first_slot\[0\] is 4; expected 0 or more and less than 4"),
        ([1, 2], [0, 2], [-1], 4, r"first_slot\[0\] is -1; expected 0 or more"),
        ([1, 2], [0, 2], [0, 0], 4, r"first_slot has 2 entries; expected 1"),
        ([1.0, 2.0], [0, 2], None, 4, r"page_indices is float64 of shape \(2,\); expected int"),
    ],
)
def test_refusals_of_arrays(indices, indptr, first, size, text):
    with pytest.raises(PageError, match=text):
        PageTable(indices, indptr, first, page_size=size)


@pytest.mark.parametrize(
    ("indices", "indptr", "first", "text"),
    [
        ([1, 2], [0, 2], None, r"page_indptr has 2 entries; expected one more than .* which is 2"),
        ([1, 2, 3], [0, 2, 3, 3], None, r"page_indptr has 4 entries; expected one more .* is 2"),
        ([1, 2, 3], [0, 1, 3], None, r"node 0 has 6 tokens from slot 0 on; expected no more than"),
        ([1, 2, 3], [0, 2, 3], [0, 2], r"node 1 has 3 tokens from slot 2 on; .* its 1 pages of 4"),
        ([1, 2, 2], [0, 2, 3], None, r"page 2 is shared by nodes 0 and 1 in overlapping slots"),
        ([1, 1, 2], [0, 2, 3], None, r"page 1 is shared by nodes 0 and 0 in overlapping slots"),
    ],
)
def test_refusals_of_a_forest(indices, indptr, first, text):
    with pytest.raises(PageError, match=text):
        PageTable(indices, indptr, first, page_size=4).check(PAIR)


def test_page_used_twice_by_many_nodes():
    """20,000 nodes, a page each; the last takes the first one's."""
    count = 20_000
    forest = Forest.from_parents([-1] * count, [16] * count)
    indices = np.random.default_rng(1).permutation(count)
    PageTable(indices, np.arange(count + 1), page_size=16).check(forest)
    indices[-1] = indices[0]
    with pytest.raises(PageError, match=rf"page {indices[0]} is shared by nodes 0 and 19999 in"):
        PageTable(indices, np.arange(count + 1), page_size=16).check(forest)


def test_examples_in_docstrings():
    done = doctest.testmod(pages)
    assert done.attempted and not done.failed


@given(tables())
def test_rows_lie_where_the_last_tokens_of_their_nodes_do(drawn):
    lengths, indices, indptr, first, size = drawn
    rows = [min(length, 2) for length in lengths]
    table = PageTable(indices, indptr, first, page_size=size)
    forest = Forest.from_parents([-1] * len(lengths), lengths, rows)
    slots = slots_of(*drawn)
    ends = np.cumsum(lengths).astype(int)
    wanted = [
        page * size + slot
        for end, count in zip(ends, rows, strict=True)
        for page, slot in slots[end - count : end]
    ]
    assert table.row_slots(forest).tolist() == wanted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pages: pickle.loads(pickle.dumps(pages))])
def test_a_copy_has_a_room_of_its_own(copied: Callable[[PageTable], PageTable]) -> None:
    """The compiled planner reads it by its address, after the original may be gone."""
    forest = Forest.from_parents([-1, 0], [6, 3])
    pages = PageTable([8, 3, 5], [0, 2, 3], page_size=4)
    pages.check(forest)
    other = copied(pages)
    assert other.room.address == other.room.lengths.ctypes.data != pages.room.address
    assert other.room.lengths.tolist() == pages.room.lengths.tolist() != [0, 0]


def test_no_page_size_is_that_of_a_cache_without_pages() -> None:
    with pytest.raises(PageError, match="page_size is 1073741824; expected less than 2"):
        PageTable([500], [0, 0, 0], [0, 6], page_size=1 << 30)
    with pytest.raises(PageError, match="page_size is 1073741824; expected less than 2"):
        PageTable([0], [0, 1], page_size=1 << 30)
    with pytest.raises(PageError, match="page_size is 2147483648; expected less than 2"):
        PageTable([0], [0, 1], page_size=1 << 31)
