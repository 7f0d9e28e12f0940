"""Page pools: random operations beside full copies, the documented examples, and every refusal."""

from __future__ import annotations

import doctest
import pickle
import re

import numpy as np
import pytest
from pool_machine import run

from deft_tvm import pool as room
from deft_tvm.errors import OutOfPages, PageError
from deft_tvm.pages import PageTable
from deft_tvm.pool import ROOT, PagePool
from deft_tvm.pool.ledger import Ledger
from deft_tvm.pool.nodes import Nodes
from deft_tvm.tree import Forest


def test_documented_example() -> None:
    assert doctest.testmod(room.pool) == (0, 10)


def test_random_operations() -> None:
    run(10_000)


def forked(*counts: int, num_pages: int = 20) -> tuple[PagePool, list[int]]:
    """A prompt of 6 tokens in pages 0 and 1 of 4, and branches of it that grew in this order."""
    pool = PagePool(num_pages, page_size=4)
    prompt = pool.root()
    pool.append({prompt: 6})
    branches = [prompt, *pool.fork(prompt, len(counts) - 1)]
    for branch, count in zip(branches, counts, strict=True):
        pool.append({branch: count})
    return pool, branches


def moves(pool: PagePool) -> list[tuple[int, int]]:
    source, target = pool.take_moves()
    assert source.dtype == target.dtype == np.int64
    return list(zip(source.tolist(), target.tolist(), strict=True))


def test_a_fork_moves_nothing_and_takes_no_page() -> None:
    pool, _ = forked(0, 0, 0)
    assert pool.num_free == 18 and moves(pool) == []
    assert repr(pool) == "PagePool(num_pages=20, page_size=4, free=18, branches=3)"


def test_the_first_to_go_on_takes_the_half_full_page() -> None:
    pool, (one, two, three) = forked(0, 0, 0)
    pool.append({two: 1})
    pool.append({three: 1, one: 1})
    assert [pool.slots(branch)[-1] // 4 for branch in (one, two, three)] == [3, 1, 2]
    assert pool.references[:4] == [1, 2, 1, 1]
    assert [pool.slots(branch)[-1] % 4 for branch in (one, two, three)] == [2, 2, 2]
    assert moves(pool) == []


def test_of_several_that_go_on_at_once_the_first_takes_it() -> None:
    pool, (one, two, three) = forked(0, 0, 0)
    pool.append({three: 1, one: 2, two: 9})
    assert pool.slots(three)[-1] == 6 and pool.references[:6] == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("left, copies", [
    (0, []),  # it goes on in the half-full page
    (1, [(4, 8), (5, 9)]),  # it has page 2
    (2, [(4, 12), (5, 13)]),
])  # fmt: skip
def test_shared_tokens_are_copied_when_sharers_part(left: int, copies: list) -> None:
    pool, branches = forked(1, 1, 1)
    other = branches[:left] + branches[left + 1 :]
    pool.prune(other[0])
    assert moves(pool) == []
    pool.prune(other[1])
    assert moves(pool) == copies and pool.num_free == 18
    forest, _ = pool.forest({branches[left]: 1})
    assert forest.num_nodes == 1 and forest.num_tokens == 7


def test_a_page_that_was_left_is_gone_on_in() -> None:
    pool, (one, _, three) = forked(1, 1, 0)
    pool.prune(one)
    pool.append({three: 1})
    assert pool.slots(three)[-1] == 6


@pytest.mark.parametrize("first, copies", [
    (0, [(0, 4), (0, 8), (5, 9)]),  # into page 1, and from there into page 2
    (1, [(5, 9), (0, 8)]),
])  # fmt: skip
def test_moves_of_moves_are_from_where_the_tokens_are(first: int, copies: list) -> None:
    """Three levels inside one page, whose sharers part from either end."""
    pool = PagePool(9, page_size=4)
    one = pool.root()
    pool.append({one: 1})
    two = pool.fork(one)[0]
    pool.append({one: 1, two: 1})  # in pages 0 and 1
    three = pool.fork(two)[0]
    pool.append({two: 1, three: 1})  # in pages 1 and 2
    gone = [one, two]
    pool.prune(gone.pop(first))
    pool.prune(gone.pop())
    assert pool.slots(three).tolist() == [8, 9, 10] and pool.num_free == 8
    assert moves(pool) == copies
    assert moves(pool) == []


def test_a_node_that_leaves_a_page_gives_up_its_slots_of_it() -> None:
    pool = PagePool(9, page_size=4)
    one = pool.root()
    pool.append({one: 1})
    two, three = pool.fork(one, 2)
    pool.append({one: 1, two: 1})  # in pages 0 and 1
    four = pool.fork(one)[0]
    pool.append({one: 1, four: 1})  # in pages 0 and 2
    pool.prune(one)
    assert moves(pool) == [(1, 9)] and pool.references[:3] == [1, 1, 1]
    pool.append({three: 3})
    assert pool.slots(three).tolist() == [0, 1, 2, 3]


def test_a_draft_of_64_tokens_takes_4_pages_of_16() -> None:
    pool = PagePool(10, page_size=16)
    branch = pool.root()
    pool.append({branch: 32})
    parents = [ROOT, *(token // 2 for token in range(63))]
    pool.append({}, {branch: parents})
    assert pool.num_free == 10 - 2 - 4 and pool.length(branch) == 32
    forest, pages = pool.forest({branch: 64})
    pages.check(forest)
    assert forest.rows.tolist() == [0] + [1] * 64
    assert forest.lengths.tolist() == [32] + [1] * 64
    assert forest.parents.tolist() == [-1, *(parent + 1 for parent in parents)]
    assert pages.row_slots(forest).tolist() == list(range(32, 96))


def test_of_a_draft_all_tokens_are_rows() -> None:
    pool, (one, two) = forked(1, 1)
    pool.append({}, {two: [ROOT, 0]})
    for said in (-1, 0, 1, 9):
        forest, _ = pool.forest({one: 1, two: said})
        assert forest.rows.tolist() == [0, 1, 0, 1, 1]


def test_what_is_accepted_moves_together() -> None:
    pool = PagePool(10, page_size=4)
    branch = pool.root()
    pool.append({branch: 3})
    pool.append({}, {branch: [ROOT, ROOT, 1, 0, 2, 4]})
    pool.accept(branch, [1, 2, 4])
    assert pool.length(branch) == 6 and pool.num_free == 8
    assert moves(pool) == [(4, 3), (5, 4), (7, 5)]


def test_what_is_accepted_where_it_is_does_not_move() -> None:
    pool = PagePool(10, page_size=4)
    branch = pool.root()
    pool.append({}, {branch: [ROOT, 0, 1, 1]})
    pool.accept(branch, [0, 1, 3])
    assert moves(pool) == [(3, 2)] and pool.length(branch) == 3


def test_a_token_that_would_move_back_stays() -> None:
    """It is to go from page 0 to page 1, which is then given up for page 0, free in between."""
    pool = PagePool(2, page_size=2)
    one = pool.root()
    pool.append({one: 1})
    two = pool.fork(one)[0]
    pool.append({one: 1, two: 1})
    pool.prune(one)
    three = pool.fork(two)[0]
    pool.rewind(two, 1)
    pool.append({two: 1})
    pool.prune(three)
    assert pool.slots(two).tolist() == [0, 1]
    assert moves(pool) == [(0, 2)], "to a page that is free, and not from slot 0 to itself"


def test_what_was_to_come_where_a_token_stays_is_forgotten() -> None:
    nodes = Nodes(Ledger(4, page_size=4))
    for source, target in ((0, 4), (8, 0), (4, 0)):
        nodes.move(np.array([source]), np.array([target]))
    assert nodes.moves == {4: 0}


def test_a_draft_that_is_refused_as_a_whole_leaves_no_page() -> None:
    pool, (one, two) = forked(0, 0)
    pool.append({one: 1}, {two: [ROOT, 0, 0]})
    assert pool.num_free == 16
    pool.accept(two, [])
    assert pool.num_free == 18 and pool.length(two) == 6
    pool.append({}, {two: []})
    pool.accept(two, [])
    assert pool.length(two) == 6


def test_rewinding_past_a_fork_leaves_the_others_what_they_had() -> None:
    pool, (one, two, three) = forked(5, 1, 1)
    before = pool.slots(one).tolist(), pool.slots(two).tolist()
    pool.rewind(three, 3)
    assert (pool.slots(one).tolist(), pool.slots(two).tolist()) == before
    forest, pages = pool.forest({one: 1, two: 1, three: 0})
    assert forest.parents.tolist() == [1, -1, 0, 0, 1]
    assert forest.lengths.tolist() == [3, 3, 5, 1, 0]
    assert pages.first_slot.tolist() == [3, 0, 2, 2, 3]
    assert pool.references[:3] == [2, 2, 1] and moves(pool) == []
    pool.append({three: 1})
    assert pool.slots(three)[-1] % 4 == 3 and pool.slots(three)[-1] != pool.slots(one)[3]


@pytest.mark.parametrize("length", range(8))
def test_rewinding_the_only_branch(length: int) -> None:
    pool, (one, two) = forked(1, 1)
    pool.prune(two)
    pool.rewind(one, length)
    assert pool.length(one) == length and pool.num_free == 20 - -(-length // 4)


def test_rewinding_to_the_beginning_begins_another_tree() -> None:
    pool, (one, two) = forked(1, 1)
    pool.rewind(two, 0)
    forest, _ = pool.forest({one: 1, two: 0})
    assert forest.parents.tolist() == [-1, -1] and forest.lengths.tolist() == [7, 0]


def test_defragment_brings_a_path_together() -> None:
    pool, (one, two, three) = forked(1, 5, 9)
    assert moves(pool) == []
    pool.prune(one)
    order = pool.defragment()
    # Page 1 is the prompt's, and nobody else's; then what two has, then what three has.
    assert order.dtype == np.int32 and order.tolist() == [0, 1, 2, 3, 4, 5, 6]
    pool.prune(two)
    pool.append({three: 0})
    assert moves(pool) == [(4, 16), (5, 17)]
    assert pool.defragment().tolist() == [0, 4, 5, 6]
    assert pool.slots(three).tolist() == list(range(15))
    pool.append({three: 2})
    assert pool.slots(three).tolist() == list(range(17)), "free pages are taken from the front"


def test_resize_keeps_what_is_in_use() -> None:
    pool, (one, two) = forked(1, 1)
    pool.resize(3)
    assert (pool.num_pages, pool.num_free) == (3, 0)
    pool.resize(5)
    assert (pool.num_pages, pool.num_free) == (5, 2)
    pool.append({one: 2, two: 2})
    assert pool.num_free == 0


def test_a_pool_without_pages() -> None:
    pool = PagePool(0, page_size=4)
    branch = pool.root()
    assert pool.defragment().tolist() == [] and pool.slots(branch).tolist() == []
    forest, _ = pool.forest({branch: 0})
    assert forest.num_nodes == 1 and pool.forest({})[0].num_nodes == 0


def test_pages_that_are_half_empty_at_both_ends() -> None:
    """The most that branches may waste: the first to go on is gone, and leaves the shared page."""
    pool = PagePool(30, page_size=4)
    one = pool.root()
    pool.append({one: 3})
    branches = [one, *pool.fork(one, 2)]
    pool.append(dict.fromkeys(branches, 2))
    assert (30 - pool.num_free) * 4 - 9 == 15 < 3 * 2 * 4
    pool.prune(one)
    assert (30 - pool.num_free) * 4 - 7 == 13 < 2 * 3 * 4


def test_topology_is_found_once() -> None:
    pool, (one, two) = forked(1, 1)
    forest, _ = pool.forest({one: 1, two: 1})
    pool.append({one: 1, two: 1})
    again, _ = pool.forest({one: 1, two: 1})
    assert again.preorder is forest.preorder and again.lengths.tolist() == [6, 2, 2]
    pool.append({two: 1})
    swapped, pages = pool.forest({two: 1, one: 1})
    assert swapped.lengths.tolist() == [6, 3, 2]
    assert pages.row_slots(swapped).tolist() == [pool.slots(two)[-1], pool.slots(one)[-1]]


def test_topology_of_a_draft_like_the_last_one_is_found_once() -> None:
    pool = PagePool(10, page_size=4)
    branch = pool.root()
    preorders = []
    for parents in ([ROOT, 0, 0], [ROOT, 0, 0], [ROOT, 0, 1]):
        pool.append({}, {branch: parents})
        forest, _ = pool.forest({branch: 3})
        assert forest.parents.tolist() == [-1, *(parent + 1 for parent in parents)]
        assert forest.lengths.tolist() == [pool.length(branch), 1, 1, 1]
        preorders.append(forest.preorder)
        pool.accept(branch, [0, 1])
    assert preorders[0] is preorders[1] is not preorders[2]


CHANGES = {
    "fork": lambda pool, one, two: pool.fork(one),
    "prune": lambda pool, one, two: pool.prune(pool.fork(two)[0]),
    "prune of another": lambda pool, one, two: pool.prune(2),
    "draft": lambda pool, one, two: pool.append({}, {one: [ROOT, 0, 0]}),
    "rewind": lambda pool, one, two: pool.rewind(one, 3),
    "rewind to nothing": lambda pool, one, two: pool.rewind(one, 0),
    "accept": lambda pool, one, two: pool.accept(3, [0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_topology_is_found_anew_after_a_change(name: str) -> None:
    def changed(*, asked_before: bool) -> tuple[Forest, PageTable]:
        pool, (one, two, three) = forked(3, 3, 3)
        four = pool.fork(three)[0]
        pool.append({}, {four: [ROOT, 0]})
        rows = {one: 0, two: 0, four: 0}
        if asked_before:
            pool.forest(rows)
        CHANGES[name](pool, one, two)
        return pool.forest(rows)

    known, pages = changed(asked_before=True)
    found, anew = changed(asked_before=False)
    assert known.same_topology(found) and known.lengths.tolist() == found.lengths.tolist()
    assert pages.page_indices.tolist() == anew.page_indices.tolist()


def refusals(pool: PagePool, one: int, two: int) -> list:
    """What is refused of a pool of 20 pages where `two` has a draft of 3, and both end at 7."""
    return [
        (lambda: pool.length(9), "branch is 9; expected one of 0, 1"),
        (lambda: pool.slots(9), "branch is 9; expected one of 0, 1"),
        (lambda: pool.fork(9), "branch is 9; expected one of 0, 1"),
        (lambda: pool.fork(one, -1), "count is -1; expected 0 or more new branches"),
        (lambda: pool.fork(two), "branch 1 has a draft; expected accept before anything else"),
        (lambda: pool.append({one: 1, 9: 1}), "branch is 9; expected one of 0, 1"),
        (lambda: pool.append({one: 1}, {9: [ROOT]}), "branch is 9; expected one of 0, 1"),
        (lambda: pool.append({one: -2}), "counts[0] is -2; expected 0 or more tokens"),
        (lambda: pool.append({one: 1}, {one: []}), "branch 0 is in counts and in drafts; expected"),
        (lambda: pool.append({one: 1, two: 1}), "branch 1 has a draft; expected accept before"),
        (lambda: pool.append({one: 1}, {two: [ROOT]}), "branch 1 has a draft; expected accept"),
        (
            lambda: pool.append({}, {one: [ROOT, 1]}),
            "drafts[0][1] is 1; expected an earlier token of the draft, or -1",
        ),
        (lambda: pool.append({}, {one: [-2]}), "drafts[0][0] is -2; expected an earlier token of"),
        (lambda: pool.accept(9, []), "branch is 9; expected one of 0, 1"),
        (lambda: pool.accept(one, [0]), "path[0] is 0; expected a token of the draft below -1"),
        (lambda: pool.accept(two, [1]), "path[0] is 1; expected a token of the draft below -1"),
        (lambda: pool.accept(two, [0, 2]), "path[1] is 2; expected a token of the draft below 0"),
        (lambda: pool.accept(two, [0, -1]), "path[1] is -1; expected a token of the draft below"),
        (lambda: pool.accept(two, [3]), "path[0] is 3; expected a token of the draft below -1"),
        (lambda: pool.prune(one, 9), "branch is 9; expected one of 0, 1"),
        (lambda: pool.prune(one, one), "branch 0 is named twice; expected each once"),
        (lambda: pool.rewind(9, 0), "branch is 9; expected one of 0, 1"),
        (lambda: pool.rewind(two, 0), "branch 1 has a draft; expected accept before anything else"),
        (lambda: pool.rewind(one, 8), "length is 8; expected 0 to 7, the tokens of branch 0"),
        (lambda: pool.rewind(one, -1), "length is -1; expected 0 to 7, the tokens of branch 0"),
        (lambda: pool.forest({9: 0}), "branch is 9; expected one of 0, 1"),
        (
            lambda: pool.forest({one: 2}),
            "rows[0] is 2; expected 0 to 1, the tokens that the branch has for itself",
        ),
        (lambda: pool.forest({two: 1, one: -1}), "rows[0] is -1; expected 0 to 1, the tokens that"),
        (lambda: pool.resize(-1), "num_pages is -1; expected 0 or more"),
        (
            lambda: pool.resize(3),
            "num_pages is 3 and page 3 is in use; expected more than that, or a pool that was "
            "defragmented",
        ),
    ]


def test_refusals_change_nothing() -> None:
    pool, (one, two) = forked(1, 1)
    pool.append({}, {two: [ROOT, 0, ROOT]})
    pool.forest({one: 1, two: 0})
    for refused, text in refusals(pool, one, two):
        before = pickle.dumps(pool)
        with pytest.raises(PageError, match=re.escape(text)):
            refused()
        assert pickle.dumps(pool) == before, text


def test_without_pages_nothing_changes() -> None:
    pool, (one, two) = forked(1, 1, num_pages=5)
    before = pickle.dumps(pool)
    for counts, drafts, needed in (
        ({one: 1, two: 10}, {}, 3),  # one token still fits in its page, ten take 3 more pages
        ({one: 1}, {two: [ROOT] * 10}, 3),
        ({one: 6, two: 2 + 4}, {}, 4),
    ):
        text = (
            f"{needed} more pages are needed and 2 of num_pages=5 are free; prune branches, or "
            "give the pool more pages"
        )
        with pytest.raises(OutOfPages, match=re.escape(text)):
            pool.append(counts, drafts)
        assert pickle.dumps(pool) == before


def test_refusals_of_a_pool_itself() -> None:
    with pytest.raises(PageError, match="num_pages is -1; expected 0 or more"):
        PagePool(-1, 4)
    for size in (0, 3, -4):
        with pytest.raises(PageError, match=f"page_size is {size}; expected a power of two"):
            PagePool(4, size)
    with pytest.raises(PageError, match="branch is 0; expected one of none, there are no branches"):
        PagePool(4, 4).prune(0)
    pool = PagePool(4, 4)
    for _ in range(9):
        pool.root()
    with pytest.raises(PageError, match="expected one of 0, 1, 2, 3, 4, 5, 6, 7, …"):
        pool.length(9)


def test_what_waits_to_be_moved_is_moved_before_pages_are_numbered_anew() -> None:
    for renumber in (lambda pool: pool.defragment(), lambda pool: pool.resize(20)):
        pool, (one, _) = forked(1, 1)
        pool.prune(one)
        with pytest.raises(
            PageError, match="there are moves that nobody took; expected take_moves before"
        ):
            renumber(pool)
        assert moves(pool) == [(4, 8), (5, 9)]
        renumber(pool)


def test_nothing_comes_in_fractions() -> None:
    pool = PagePool(8, page_size=4)
    branch = pool.root()
    pool.append({branch: 2})
    for use, name in (
        (lambda: pool.append({branch: 1.5}), "counts[0]"),
        (lambda: pool.append({}, {branch: [ROOT, 1.5]}), "drafts[0][1]"),
        (lambda: pool.fork(branch, 1.5), "count"),
        (lambda: pool.rewind(branch, 1.5), "length"),
        (lambda: pool.accept(branch, [1.5]), "path[0]"),
        (lambda: pool.resize(1.5), "num_pages"),
        (lambda: PagePool(1.5, 4), "num_pages"),
        (lambda: PagePool(8, 1.5), "page_size"),
    ):
        with pytest.raises(PageError, match=re.escape(f"{name} is 1.5; expected an integer")):
            use()
    assert (pool.length(branch), pool.branches, pool.num_pages) == (2, [branch], 8)
