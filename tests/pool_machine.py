"""Random operations on a `PagePool`, beside a cache that copies all tokens for every branch.

Tokens are numbers that never come twice, so that the trees which a pool should have follow from the
copies: they are those of shared prefixes, whatever was done to get there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from deft_tvm.errors import OutOfPages, PageError
from deft_tvm.pages import PageTable
from deft_tvm.pool import ROOT, PagePool
from deft_tvm.tree import Forest

NOTHING = -1
"""What slots hold that have no token."""

MOST_BRANCHES = 12

SETTINGS = settings(
    max_examples=20,
    stateful_step_count=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

picks = st.integers(0, 99)
several = st.lists(st.tuples(picks, st.integers(0, 9)), min_size=1, max_size=5)


class Draft:
    """A draft's tokens, and the parent of each."""

    def __init__(self, parents: list[int], tokens: list[int]) -> None:
        self.parents, self.tokens = parents, tokens

    def walk(self, turns: list[int]) -> list[int]:
        """A path from the top, at each of whose tokens a number says which way it goes on."""
        path = [ROOT]
        for turn in turns:
            below = [token for token, parent in enumerate(self.parents) if parent == path[-1]]
            if not below:
                break
            path.append(below[turn % len(below)])
        return path[1:]


class PoolMachine(RuleBasedStateMachine):
    """One pool and what it should be.

    Attributes:
        memory: one number for each slot, as tensors have a row.
        copies: of each branch the tokens of its path.
        drafts: of the branches that have one.
        operations: how many were done, by all machines together.
    """

    operations = 0

    @initialize(
        page_size=st.sampled_from((4, 1, 2, 8)),
        num_pages=st.sampled_from((30, 8, 100)),
        prompt=st.integers(0, 12),
        forks=st.integers(0, 5),
    )
    def begin(self, page_size: int, num_pages: int, prompt: int, forks: int) -> None:
        """A prompt and branches of it."""
        self.pool = PagePool(num_pages, page_size)
        self.memory = np.full(num_pages * page_size, NOTHING)
        self.copies: dict[int, list[int]] = {}
        self.drafts: dict[int, Draft] = {}
        self.next_token = 0
        self.root()
        self.append({0: prompt}, {})
        self.fork(0, forks)

    @property
    def settled(self) -> list[int]:
        """Branches without a draft."""
        return [branch for branch in self.copies if branch not in self.drafts]

    def some(self, branches: list[int], chosen: list[tuple[int, int]]) -> dict[int, int]:
        """A number for each of several branches."""
        return {branches[pick % len(branches)]: number for pick, number in chosen}

    def new_tokens(self, count: int) -> list[int]:
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def tried(
        self, operation: Callable[[], None], lengths: dict[int, int], going_on: dict[int, int]
    ) -> bool:
        """Whether it found pages, which it shall where there are enough; if not, nothing changed.

        Args:
            operation: what appends.
            lengths: by how many tokens each branch grows.
            going_on: which of them need no page for the first.
        """
        size, free, before = self.pool.page_size, self.pool.num_free, pickle.dumps(self.pool)
        needed = 0
        for branch, count in lengths.items():
            end = len(self.copies[branch])
            begins = count > 0 and end % size > 0 and branch not in going_on
            needed += -(-(end + count) // size) - -(-end // size) + begins
        try:
            operation()
        except OutOfPages:
            assert needed > free and pickle.dumps(self.pool) == before
            return False
        assert self.pool.num_free == free - needed
        return True

    def going_on(self, lengths: dict[int, int]) -> dict[int, int]:
        """Branches that grow in the page of their last token, and its number.

        Each does where nobody else has a token behind it, and of several with the same last token
        the first.
        """
        size, pages = self.pool.page_size, {}
        taken = set(self.held_slots().tolist())
        for branch, count in lengths.items():
            if not count or len(self.copies[branch]) % size == 0:
                continue
            last = int(self.pool.slots(branch)[-1])
            page = last // size
            behind = range(last + 1, (page + 1) * size)
            if taken.isdisjoint(behind) and page not in pages.values():
                pages[branch] = page
        return pages

    def held_slots(self) -> np.ndarray:
        """Where tokens lie, of branches and of drafts."""
        kept = [self.pool.slots(branch) for branch in self.copies]
        kept += [self.draft_slots(branch) for branch in self.drafts]
        return np.concatenate([np.zeros(0, int), *kept])

    @rule()
    @precondition(lambda self: len(self.copies) < 4)
    def root(self) -> None:
        self.copies[self.pool.root()] = []

    @rule(pick=picks, count=st.integers(0, 3))
    @precondition(lambda self: self.settled and len(self.copies) < MOST_BRANCHES)
    def fork(self, pick: int, count: int) -> None:
        branch = self.settled[pick % len(self.settled)]
        free, references = self.pool.num_free, self.pool.references
        for new in self.pool.fork(branch, count):
            assert new not in self.copies
            self.copies[new] = list(self.copies[branch])
        assert (free, references) == (self.pool.num_free, self.pool.references)

    @rule(grown=several)
    @precondition(lambda self: self.settled)
    def grow(self, grown: list[tuple[int, int]]) -> None:
        self.append(self.some(self.settled, grown), {})

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.settled)
    def grow_all(self, count: int) -> None:
        """As in decoding; often the branches of the step before."""
        self.append(dict.fromkeys(self.settled, count), {})

    @rule(grown=several, tried=several, shape=st.lists(picks, min_size=9, max_size=9))
    @precondition(lambda self: self.settled)
    def draft(
        self, grown: list[tuple[int, int]], tried: list[tuple[int, int]], shape: list[int]
    ) -> None:
        """Drafts of some branches, beside which others grow."""
        sizes = self.some(self.settled, tried)
        counts = {b: n for b, n in self.some(self.settled, grown).items() if b not in sizes}
        drafts = {
            branch: [shape[token] % (token + 1) - 1 for token in range(size)]
            for branch, size in sizes.items()
        }
        self.append(counts, drafts)

    def append(self, counts: dict[int, int], drafts: dict[int, list[int]]) -> None:
        """Write the new tokens where the rows of the step are, if there are pages."""
        rows = {**counts, **{branch: len(parents) for branch, parents in drafts.items()}}
        going_on = self.going_on(rows)
        if not self.tried(lambda: self.pool.append(counts, drafts), rows, going_on):
            return
        forest, pages = self.pool.forest(rows)
        pages.check(forest)
        slots, before = pages.row_slots(forest), 0
        self.settle()
        for branch, count in rows.items():
            new, own = self.new_tokens(count), slots[before : before + count]
            assert branch not in going_on or own[0] // self.pool.page_size == going_on[branch]
            self.memory[own] = new
            before += count
            if branch in counts:
                self.copies[branch] += new
            elif new:
                self.drafts[branch] = Draft(drafts[branch], new)
        self.check_positions(forest, counts, drafts)

    def check_positions(
        self, forest: Forest, counts: dict[int, int], drafts: dict[int, list[int]]
    ) -> None:
        expected = [i for b, n in counts.items() if n for i in range(len(self.copies[b]))[-n:]]
        for branch, parents in drafts.items():
            depth: list[int] = []
            for parent in parents:
                depth.append(0 if parent == ROOT else depth[parent] + 1)
            expected += [len(self.copies[branch]) + level for level in depth]
        found = np.empty(forest.num_rows, int)
        found[forest.row_order] = forest.row_positions
        assert found.tolist() == expected

    @rule(pick=picks, turns=st.lists(picks, max_size=9))
    @precondition(lambda self: self.drafts)
    def accept(self, pick: int, turns: list[int]) -> None:
        branch = list(self.drafts)[pick % len(self.drafts)]
        draft = self.drafts.pop(branch)
        path = draft.walk(turns)
        self.pool.accept(branch, path)
        self.copies[branch] += [draft.tokens[token] for token in path]

    @rule(chosen=st.lists(picks, min_size=1, max_size=5))
    @precondition(lambda self: self.copies)
    def prune(self, chosen: list[int]) -> None:
        pruned = {list(self.copies)[pick % len(self.copies)] for pick in chosen}
        self.pool.prune(*pruned)
        for branch in pruned:
            del self.copies[branch]
            self.drafts.pop(branch, None)

    @rule(pick=picks, kept=st.integers(0, 99))
    @precondition(lambda self: self.settled)
    def rewind(self, pick: int, kept: int) -> None:
        branch = self.settled[pick % len(self.settled)]
        length = kept % (len(self.copies[branch]) + 1)
        self.pool.rewind(branch, length)
        del self.copies[branch][length:]

    @rule()
    @precondition(lambda self: self.pool._nodes.moves)
    def take_moves(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Do what is to be moved, and spoil all slots without tokens."""
        source, target = self.pool.take_moves()
        self.memory[target] = self.memory[source]
        spoiled = np.ones(len(self.memory), bool)
        spoiled[self.held_slots()] = False
        self.memory[spoiled] = NOTHING

    @rule(num_pages=st.none() | st.integers(0, 60))
    def renumber(self, num_pages: int | None) -> None:
        """Defragment, or resize."""
        self.settle()
        if num_pages is None:
            self.defragment()
        else:
            self.resize(num_pages)

    def defragment(self) -> None:
        used = [holders for holders in self.pool.references if holders]
        order = self.pool.defragment()
        pages = self.memory.reshape(-1, self.pool.page_size)
        pages[: len(order)] = pages[order]
        pages[len(order) :] = NOTHING
        assert len(order) == len(used) and all(self.pool.references[: len(order)])

    def resize(self, num_pages: int) -> None:
        used = [page for page, holders in enumerate(self.pool.references) if holders]
        before = pickle.dumps(self.pool)
        try:
            self.pool.resize(num_pages)
        except PageError:
            assert num_pages <= used[-1] and pickle.dumps(self.pool) == before
            return
        assert num_pages > max(used, default=-1)
        pages = np.full((num_pages, self.pool.page_size), NOTHING)
        kept = self.memory.reshape(-1, self.pool.page_size)[:num_pages]
        pages[: len(kept)] = kept
        self.memory = pages.reshape(-1)

    def draft_slots(self, branch: int) -> np.ndarray:
        forest, pages = self.pool.forest({branch: 0})
        return pages.row_slots(forest)

    @invariant()
    def branches_read_their_tokens(self) -> None:
        """After the moves, which are not taken for that."""
        type(self).operations += 1
        memory = self.memory.copy()
        moves = self.pool._nodes.moves
        memory[list(moves)] = self.memory[list(moves.values())]
        assert self.pool.branches == list(self.copies)
        for branch, tokens in self.copies.items():
            assert self.pool.length(branch) == len(tokens)
            assert memory[self.pool.slots(branch)].tolist() == tokens
        for branch, draft in self.drafts.items():
            assert memory[self.draft_slots(branch)].tolist() == draft.tokens

    @invariant()
    def pool_is_as_it_should_be(self) -> None:
        forest, pages = self.pool.forest(dict.fromkeys(self.copies, 0))
        pages.check(forest)
        self.trees_are_those_of_shared_prefixes(forest)
        self.pages_are_held_by_nodes(forest, pages)

    def trees_are_those_of_shared_prefixes(self, forest: Forest) -> None:
        """But that a root may be empty, above branches that began as one and share nothing."""
        node = forest.rows == 0
        below = np.bincount(forest.parents[node & (forest.parents >= 0)], minlength=len(node))
        assert not (below[node] == 1).any()
        assert node.sum() < 2 * len(self.copies) or not self.copies
        ended = [[*copy, 2**30 + branch] for branch, copy in self.copies.items()]
        wanted, ends = Forest.from_branches(ended)
        lengths = wanted.lengths.copy()
        lengths[ends] -= 1
        bare = node & (forest.parents < 0) & (forest.lengths == 0) & (below > 0)
        found = zip(forest.start[node & ~bare], forest.lengths[node & ~bare], strict=True)
        assert sorted(found) == sorted(zip(wanted.start, lengths, strict=True))

    def pages_are_held_by_nodes(self, forest: Forest, pages: PageTable) -> None:
        held = np.zeros(self.pool.num_pages, int)
        for node in np.flatnonzero(forest.rows == 0):
            begin, end = pages.page_indptr[node : node + 2]
            held[pages.page_indices[begin:end]] += 1
        assert self.pool.references == held.tolist()
        assert self.pool.num_free == (held == 0).sum()
        empty = self.pool.page_size * (held > 0).sum() - forest.num_tokens
        assert empty < 3 * self.pool.page_size * max(1, len(self.copies))

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.prune(*self.copies)
            assert self.pool.num_free == self.pool.num_pages
            assert not any(self.pool.references) and self.pool.branches == []


def run(operations: int, first_seed: int = 0) -> None:
    """So many random operations or a few more, always the same ones after one seed."""
    goal, number = PoolMachine.operations + operations, first_seed
    while PoolMachine.operations < goal:
        run_state_machine_as_test(seed(number)(PoolMachine), settings=SETTINGS)
        number += 1
