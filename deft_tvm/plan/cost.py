"""What a work item costs on a device, so that a plan can be chosen before it is run.

One unit of work is an item under as many KV heads as its tile class takes at a time: one, or with
few rows all that lie side by side. Units are independent, and each runs on one core (or SM). With T
tokens, a tile class of M lane rows that walks N tokens a step, and r rows, under one head

    seconds(unit) = max(T · bytes / bandwidth,
                        ⌈T/N⌉ · N · (L · 2 (q_width + v_width) / rate + loading)) + fixed
    seconds(plan) = makespan of its units over the cores + its partials / bandwidth

Loading is what a token takes whatever the rows are: locating it, and copying its K and V out of
their page. L is r · group rounded up to what the class computes at a time, M on a GPU and with few
lane rows, since lanes that hold no row are computed all the same (PAT, ASPLOS 2026, measures 39 %
lost with one tile for all). A partial is heavy, as it is float32 in every query head, written and
read: one row's is worth 8 tokens of bfloat16 GQA-32/8 KV.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deft_tvm.dtypes import DTYPE_BYTES
from deft_tvm.errors import PlanError
from deft_tvm.plan.residency import GROUP_ROWS, can_group, unit_bytes
from deft_tvm.spec import AttentionSpec, TileShape

if TYPE_CHECKING:
    from deft_tvm.device import DeviceProfile

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]
Rates = tuple[tuple[str, float], ...]

FEW_LANE_ROWS = 16
"""Tile classes below this many lane rows have lanes over the head dimension, not over rows."""
GRANULES: dict[str, dict[str, dict[int, int]]] = {
    "vectors": {"float32": {16: 8}, "bfloat16": {48: 48, 32: 16, 16: 16}},
    "amx": {"float32": {16: 8}, "bfloat16": {32: 32, 16: 16}},
}
"""By what multiplies, and by operand: lane rows of a CPU's register tile, and the fewest that the
last tile of an item computes. A class has the widest tile that divides it."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """The device's rates, and what share of them the kernels reach.

    Rates come from a `DeviceProfile`; the shares are in `ON_CPU` and `ON_CUDA`.

    Attributes:
        cores: cores or SMs that take units.
        read_bandwidth: bytes/s of all cores together.
        matrix_rate: FLOP/s of all cores together, by operand dtype.
        launch_seconds: one kernel launch.
        matrix_share: of the matrix rate, by operand, that products with rows in lanes reach;
            float32's where an operand has none.
        few_share: the same with fewer than 16 lane rows.
        loading_seconds: of a token under one head, beside copying it, with rows in lanes.
        few_loading_seconds: the same, with fewer than 16 lane rows, copying included.
        copy_rate: bytes/s at which one core copies K and V out of their pages.
        bandwidth_share: of the read bandwidth: 0.8, one sequence of 65,536 float32 tokens (AMD
            EPYC Zen 4, 2 cores, 2026-11-21).
        unit_seconds: taking a unit from the queue, looking its rows and pages up (a guess, not
            measured).
        reach_bytes: KV of an item, all heads together, above which an item that waits for memory
            is cut, so that cores which get unequal shares of the memory end together, and heads
            worked on one after another find near what was read for the ones before. 8 MiB: one
            sequence of 65,536 tokens takes 0.98 of the time with 64 MiB in float32, 0.94 in
            bfloat16 (AMD EPYC Zen 4, 2 cores, 2026-11-21). 0: no limit, as on a GPU.
        few_rows: below so many lane rows `few_share` and `few_loading_seconds` hold.
        group_share: the same from `GROUP_ROWS` lane rows on, where warps multiply in groups.
        archs: of a GPU's binaries, by which they may.
        blocks_at_a_time: units that a multiprocessor works on at a time, each of which counts as a
            core; a unit of a class that leaves no room for a second one takes two.
        shared_bytes: memory of a multiprocessor, where that is so.
        trimmed: kernels end where an item's rows do, as on a CPU, in steps of these `GRANULES`;
            empty: they do not.
    """

    cores: int
    read_bandwidth: float
    matrix_rate: Rates
    launch_seconds: float = 0.0
    matrix_share: Rates = (("float32", 0.8),)
    few_share: Rates = (("float32", 0.4),)
    loading_seconds: float = 0.0
    few_loading_seconds: float = 0.0
    copy_rate: float = np.inf
    bandwidth_share: float = 0.8
    unit_seconds: float = 1e-6
    reach_bytes: int = 0
    trimmed: str = ""
    few_rows: int = FEW_LANE_ROWS
    group_share: Rates = ()
    archs: tuple[str, ...] = ()
    blocks_at_a_time: int = 1
    shared_bytes: int = 0

    @classmethod
    def from_profile(cls, profile: DeviceProfile) -> CostModel:
        """The rates that `profile` holds, with the default shares."""
        rates = cls(
            cores=max(1, profile.cores),
            read_bandwidth=profile.read_bandwidth,
            matrix_rate=tuple(sorted(profile.matrix_rate.items())),
            launch_seconds=profile.launch_seconds,
        )
        if profile.kind == "cpu":
            tiles = "amx" if "amx-bf16" in profile.features else "vectors"
            return replace(rates, **ON_CPU, trimmed=tiles)
        return replace(
            rates,
            **ON_CUDA,
            archs=(profile.target()["arch"],),
            cores=CUDA_BLOCKS * rates.cores,
            blocks_at_a_time=CUDA_BLOCKS,
            shared_bytes=profile.target()["max_shared_memory_per_block"],
        )

    def block(self, tile: TileShape) -> tuple[int, int]:
        """Lane rows that the kernel of `tile` computes at a time, and at least at the end.

        Whole ones are priced: half a block takes 0.66 of the time of one (AMD EPYC Zen 1, float32,
        2026-11-28), and plans that count on halves are no faster.
        """
        if self.trimmed and tile.lane_rows > FEW_LANE_ROWS:
            granules = GRANULES[self.trimmed]
            for block, least in granules.get(tile.operand, granules["float32"]).items():
                if tile.lane_rows % block == 0:
                    return block, least if tile.lane_rows > block else block
        return tile.lane_rows, tile.lane_rows

    def loading(self, spec: AttentionSpec, tile: TileShape) -> float:
        """Seconds in which one core locates and copies a token under all KV heads."""
        if tile.lane_rows < self.few_rows:
            return spec.num_kv_heads * self.few_loading_seconds
        return spec.num_kv_heads * self.loading_seconds + token_bytes(spec) / self.copy_rate

    def blocks(self, spec: AttentionSpec, tile: TileShape) -> int:
        """Units of `tile` that fit beside each other: queries, and two steps of K and V."""
        if not self.shared_bytes:
            return 1
        return min(
            self.blocks_at_a_time, max(1, self.shared_bytes // unit_bytes(spec, tile, STAGES))
        )

    def rate(self, spec: AttentionSpec, tile: TileShape) -> float:
        """FLOP/s that one core reaches in `tile`; float32's where its operand was not measured."""
        rates = dict(self.matrix_rate)
        shares = dict(self.few_share if tile.lane_rows < self.few_rows else self.matrix_share)
        if tile.lane_rows >= GROUP_ROWS and can_group(spec, tile.operand, self.archs):
            shares |= dict(self.group_share)
        rate = rates.get(tile.operand, rates["float32"])
        return shares.get(tile.operand, shares["float32"]) * rate / self.cores


ON_CPU: dict[str, Any] = {
    "matrix_share": (("float32", 1.0), ("bfloat16", 0.82)),
    "few_share": (("float32", 0.6), ("bfloat16", 0.3)),
    "loading_seconds": 25e-9,
    "few_loading_seconds": 5e-9,
    "copy_rate": 50e9,
    "reach_bytes": 8 << 20,
}
"""Fitted to GQA-32/8 of width 128 with 4 to 128 lane rows over 4,000 tokens, where a token and head
take 45 ns + 5.3 ns a lane row in float32, and 35 ns + 2.9 ns in bfloat16 (AMD EPYC Zen 4 with
AVX512-BF16, 2026-11-21)."""


CUDA_BLOCKS = 2
"""Units that a multiprocessor works on at a time: each is a block that waits most of its time."""

STAGES = 2
"""Of K and V, that kernels hold where they fit."""

ON_CUDA: dict[str, Any] = {
    "matrix_share": (("float32", 0.4), ("float16", 0.18), ("bfloat16", 0.18)),
    "few_share": (("float32", 0.1), ("float16", 0.16), ("bfloat16", 0.16)),
    "group_share": (("float16", 0.45), ("bfloat16", 0.45)),
    "few_rows": 17,
    "bandwidth_share": 0.85,
    "unit_seconds": 9e-6,
    "launch_seconds": 5e-6,
}
"""Among the best of 72 choices, whose plans take 1.001 times what the best ones do in the mean of
60 steps of MHA, GQA, MQA, MLA and GLA, and 1.06 at most (`benchmarks/prices.py`). A unit's share is
what it waits for before its first product and after its last one, of which a second one beside it
hides little; a launch counts with the time in which its last units wait (NVIDIA H200, 2026-11-28).
"""


@dataclass(frozen=True, eq=False)
class Prices:
    """The cost model of one spec and its tile classes, in seconds; one array entry a tile class.

    Attributes:
        capacity: rows that an item of the class may hold.
        kv_tile: tokens a step.
        granule: lane rows of which it computes a multiple.
        row_step: rows of a block of the largest class.
        units: of an item.
        step_seconds: by number of rows, both products of one step under all KV heads, by one core.
        fixed_seconds: by number of rows, starts of all units, and their lanes of Q and output, by
            one core; infinite for more rows than the class holds.
        token_seconds: reading one token under all KV heads, by one core.
        partial_seconds: writing and reading one row's partial, with all cores at it.
        launch_seconds: one kernel launch.
        cores: units at a time.
        longest: tokens of an item that waits for memory, at the most.
        joins: classes of a plan are joined where fewer launches pay.
    """

    capacity: Ints
    kv_tile: Ints
    granule: Ints
    row_step: int
    units: Ints
    step_seconds: Floats
    fixed_seconds: Floats
    token_seconds: float
    partial_seconds: float
    launch_seconds: float
    cores: int
    longest: int
    joins: bool = False

    @property
    def classes(self) -> int:
        return len(self.capacity)

    @cached_property
    def granules(self) -> tuple[int, ...]:
        return tuple(self.granule.tolist())

    @cached_property
    def most_rows(self) -> int:
        return int(self.capacity.max())

    @cached_property
    def cut_steps(self) -> Ints:
        """int[C], of how many tokens a cut holds a whole number: a step of the class that takes
        most at a time. On a GPU it is one of the group's own class, as units there are few, so that
        one step more or less of each matters."""
        longest = np.full_like(self.kv_tile, self.kv_tile.max())
        return self.kv_tile if self.joins else longest

    def choose_tile(self, tokens: Ints, rows: Ints) -> tuple[Ints, Floats]:
        """The class in which an item's units together are cheapest, and the seconds of one.

        Args:
            tokens: int[I], tokens of each item.
            rows: int[I], rows of each item, at most `most_rows`.
        """
        seconds = self._item_seconds(tokens, rows)
        best = seconds.argmin(axis=0)
        return best, seconds.min(axis=0) / self.units[best]

    def joined(self, tokens: Ints, rows: Ints, tile: Ints, seconds: Floats) -> tuple[Ints, Floats]:
        """All items in the last class that they have, if that ends earlier than one class after
        the other, each with a launch: else as they are.

        Args:
            tokens: int[I], tokens of each item.
            rows: int[I], rows of each item.
            tile: int[I], the class of each.
            seconds: float[I], of one unit of each.
        """
        used = sorted(set(tile.tolist())) if self.joins else []
        if len(used) < 2:
            return tile, seconds
        apart = self.launch_seconds * (len(used) - 1)
        apart += float(by_class(tile, seconds, self.units[tile], self.cores))
        last = used[-1]
        together = self._item_seconds(tokens, rows)[last] / self.units[last]
        units = np.full(len(tokens), self.units[last])
        if float(makespan(together, units, self.cores)) < apart:
            return np.full_like(tile, last), together
        return tile, seconds

    def _item_seconds(self, tokens: Ints, rows: Ints) -> Floats:
        """float[C, I], of all units one after another; infinite where a class is too small."""
        seconds: Floats = np.ceil(tokens / self.kv_tile[:, None])
        seconds *= self.step_seconds[:, rows]
        np.maximum(seconds, tokens * self.token_seconds, out=seconds)
        seconds += self.fixed_seconds[:, rows]
        return seconds

    def smallest_tile(self, rows: Ints) -> Ints:
        """The class with the fewest lane rows that holds each item's rows: no cost, no device."""
        by_size = np.lexsort((self.kv_tile, self.capacity))
        return by_size[np.searchsorted(self.capacity[by_size], rows)]

    def units_of(self, tokens: Ints, rows: Ints) -> tuple[Ints, Floats, Ints]:
        """Each group's class, seconds of a unit and number of units; too many rows are cut in
        blocks, of which the last may be smaller: what is told is an even share."""
        blocks = -(-rows // self.most_rows)
        tile, seconds = self.choose_tile(tokens, -(-rows // np.maximum(blocks, 1)))
        return tile, seconds, blocks * self.units[tile]

    def cost(
        self,
        tokens: Ints,
        rows: Ints,
        balanced: float | None = None,
        planned: int | None = None,
    ) -> tuple[Floats, float]:
        """What each group costs the plan: seconds that it keeps the whole device busy, and the
        partials of the cuts without which one of its units would outlast the plan.

        Args:
            tokens: int[G], tokens of each group; a group without any costs nothing.
            rows: int[G], rows of each group.
            balanced: seconds in which the whole plan could end; by default these groups' own.
            planned: only the first so many groups count there, others are what could replace them.

        Returns:
            float[G], and `balanced`.
        """
        _, seconds, units = self.units_of(tokens, rows)
        seconds *= tokens > 0
        busy = seconds * units / self.cores
        balanced = float(running_sum(busy[:planned])) if balanced is None else balanced
        if balanced >= seconds.max(initial=0):
            return busy, balanced
        cuts = np.maximum(seconds / balanced - 1, 0)
        return busy + cuts * rows * self.partial_seconds, balanced

    def read_seconds(self, tokens: Ints) -> float:
        """Seconds that reading the tokens of all groups takes at the least, by all cores."""
        return int(tokens.sum()) * self.token_seconds / self.cores

    def merge_seconds(self, row_begin: Ints, row_end: Ints) -> float:
        """Seconds that the partials take of groups which answer for the given rows."""
        change = np.bincount(row_begin, minlength=int(row_end.max(initial=0)) + 1)
        covers = (change - np.bincount(row_end, minlength=len(change))).cumsum()
        partials = int(covers[covers > 1].sum())
        return partials * self.partial_seconds + (partials > 0) * self.launch_seconds


def makespan(seconds: Floats, units: Ints, cores: int) -> Floats:
    """Time until the last of the units ends, when the longest are taken first.

    Two lower bounds, near which longest-first scheduling ends (Graham 1969): the mean load, and
    for each length, that some core takes its share of the units at least so long.

    Args:
        seconds: float[..., G], length of the units of a group.
        units: int[..., G], how many units it has.
        cores: units that run at a time.
    """
    order = (-seconds).argsort(axis=-1)
    if seconds.ndim > 1:  # faster than take_along_axis
        order += np.arange(0, seconds.size, seconds.shape[-1])[:, None]
    longest_first = seconds.ravel()[order]
    taken = units.ravel()[order].cumsum(axis=-1)
    waves = -(-taken // cores)
    mean = running_sum(seconds * units) / cores
    return np.maximum(mean, (waves * longest_first).max(axis=-1, initial=0.0))


def by_class(tile: Ints, seconds: Floats, units: Ints, cores: int) -> Floats:
    """float[...], the time of the units of tile classes that run one class after another."""
    first, *others = sorted(set(tile.ravel().tolist()))
    if not others:
        return makespan(seconds, units, cores)
    total = makespan(seconds * (tile == first), units, cores)
    for each in others:
        total += makespan(seconds * (tile == each), units, cores)
    return total


def running_sum(seconds: Floats) -> Any:
    """float[...], the sum along the last axis, one after another: a loop in C finds the same bits,
    which numpy's sum in pairs does not."""
    return seconds.cumsum(axis=-1)[..., -1] if seconds.shape[-1] else seconds.sum(axis=-1)


@lru_cache(maxsize=64)
def prices(spec: AttentionSpec, tiles: tuple[TileShape, ...], model: CostModel) -> Prices:
    """What items of `spec` cost in each of `tiles`.

    Raises:
        PlanError: no tile class holds the lane rows of even one row.
    """
    capacity = np.array([tile.lane_rows // spec.group for tile in tiles], np.int64)
    if not capacity.any():
        raise PlanError(
            f"tiles hold {[tile.lane_rows for tile in tiles]} lane rows; expected one that holds "
            f"a row, which is {spec.group} (num_q_heads / num_kv_heads)"
        )
    if wrong := [tile.name for tile in tiles if spec.num_kv_heads % tile.heads]:
        raise PlanError(
            f"tiles {', '.join(wrong)} take several heads at a time; expected a divisor of "
            f"num_kv_heads, which is {spec.num_kv_heads}"
        )
    bandwidth = model.bandwidth_share * model.read_bandwidth
    a_core = bandwidth / model.cores
    heads = np.array([tile.heads * model.blocks(spec, tile) for tile in tiles], np.int64)
    units = spec.num_kv_heads * max(1, model.blocks_at_a_time) // heads
    kv_tile = np.array([tile.kv_tile for tile in tiles], np.int64)
    widths = spec.q_width + spec.v_width
    rows = np.arange(capacity.max() + 1)
    block, granule = np.array([model.block(tile) for tile in tiles]).T
    step = block[:, None]
    lanes = spec.num_kv_heads * (-(-rows * spec.group // step) * step)
    fixed_seconds = (units * model.unit_seconds)[:, None] + 4 * widths * lanes / a_core
    fixed_seconds[rows > capacity[:, None]] = np.inf
    rate = np.array([[model.rate(spec, tile)] for tile in tiles])
    loading = np.array([[model.loading(spec, tile)] for tile in tiles])
    return Prices(
        capacity=capacity,
        kv_tile=kv_tile,
        granule=granule,
        row_step=max(1, int(block[capacity.argmax()]) // spec.group),
        step_seconds=(2.0 * widths * lanes / rate + loading) * kv_tile[:, None],
        units=units,
        fixed_seconds=fixed_seconds,
        token_seconds=token_bytes(spec) / a_core,
        partial_seconds=2 * partial_bytes(spec) / bandwidth,
        launch_seconds=model.launch_seconds,
        cores=model.cores,
        longest=_longest(spec, model.reach_bytes, int(kv_tile.max())),
        joins=model.blocks_at_a_time > 1,
    )


def _longest(spec: AttentionSpec, reach_bytes: int, step: int) -> int:
    """Whole steps of tokens that lie within the reach."""
    if not reach_bytes:
        return np.iinfo(np.int32).max
    tokens = reach_bytes // token_bytes(spec)
    return max(tokens // step, 1) * step


def token_bytes(spec: AttentionSpec) -> int:
    """Bytes of one token that an item reads: K, V and rope of all KV heads, a tied state once."""
    return sum(kv_bytes(spec).values())


def kv_bytes(spec: AttentionSpec) -> dict[str, int]:
    """The same by kind; where K lies inside V, it is all V's.

    A rope that all heads share is read from memory once: an item's heads are worked on side by
    side and one after another, so that the other heads find it in a cache that they share.
    """
    k, v = spec.buffers[spec.k.buffer], spec.buffers[spec.v.buffer]
    rope = spec.buffers[spec.rope] if spec.rope is not None else None
    return {
        "k": 0 if spec.tied else spec.num_kv_heads * spec.k_width * DTYPE_BYTES[k.dtype],
        "v": spec.num_kv_heads * spec.v_width * DTYPE_BYTES[v.dtype],
        "rope": rope.heads * rope.width * DTYPE_BYTES[rope.dtype] if rope else 0,
    }


def partial_bytes(spec: AttentionSpec) -> int:
    """Bytes of one row's partial: output and LSE of every query head, float32."""
    return 4 * (spec.v_width + 1) * spec.num_q_heads
