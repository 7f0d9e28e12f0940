"""What one attention is: head counts, which cache columns are K and V, dtypes, scale, page layout.

One formula serves every variant. With ``kv`` the cache buffers of a layer and ``h`` a KV head,

    K_h = buffer[k.buffer][h, k.begin:k.end] ⊕ rope        V_h = buffer[v.buffer][h, v.begin:v.end]

and query head ``j`` attends to KV head ``j // group``. MHA, GQA and MQA keep K and V in buffers of
their own and have no separate rope; variants with a shared state name the same buffer twice
(`tied`), and their tile is loaded once. The order of a query row is nope then rope.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

from deft_tvm.dtypes import DTYPE_BYTES, FP8, SHORT_DTYPE, CacheDtype, Dtype, Layout
from deft_tvm.errors import SpecError
from deft_tvm.spec_checks import check

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class CacheBuffer:
    """One tensor of the KV cache: ``heads`` heads of ``width`` elements per token."""

    name: str
    heads: int
    width: int
    dtype: CacheDtype

    @property
    def scaled(self) -> bool:
        """Its elements are read times a scale."""
        return self.dtype == FP8


@dataclass(frozen=True, slots=True)
class Region:
    """Columns ``[begin, end)`` of cache buffer number ``buffer``."""

    buffer: int
    begin: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.begin


class Options(TypedDict, total=False):
    """Fields of `AttentionSpec` that every constructor takes and that mean the same in all."""

    page_size: int
    layout: Layout
    soft_cap: float | None
    window: int | None
    sinks: bool


@dataclass(frozen=True)
class AttentionSpec:
    """A complete description of one attention; immutable, hashable, and what a module is made for.

    Attributes:
        num_q_heads: query heads, a multiple of `num_kv_heads`.
        num_kv_heads: KV (or latent) heads.
        buffers: the cache tensors of one layer, in the order in which ``run`` takes them.
        k: the columns that are multiplied with the query (without rope).
        v: the columns that are averaged.
        rope: number of the buffer that holds the rotated part of K, or None if K contains it.
        scale: multiplies the scores; required, since absorbed widths cannot tell it.
        dtype: element type of q and out.
        page_size: tokens a page, a power of two.
        layout: ``NHD`` is ``[pages, page_size, heads, width]``, ``HND`` swaps the middle two.
        soft_cap: a scaled score s becomes ``soft_cap · tanh(s / soft_cap)``, as in Gemma 2
            (arXiv 2408.00118, section 2); None for no cap.
        window: a row sees those of its path's tokens that are less than so many positions before
            its own, itself counted (Mistral 7B, arXiv 2310.06825, section 2); None for all.
        sinks: whether each query head has a learned logit without a value in its softmax, as in
            gpt-oss.

    Raises:
        SpecError: a field is out of range or does not fit the others.
    """

    num_q_heads: int
    num_kv_heads: int
    buffers: tuple[CacheBuffer, ...]
    k: Region
    v: Region
    scale: float
    dtype: Dtype = "float32"
    rope: int | None = None
    page_size: int = 16
    layout: Layout = "NHD"
    soft_cap: float | None = None
    window: int | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        check(self)

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def k_width(self) -> int:
        """Width of the key without its separate rope part."""
        return self.k.width

    @property
    def rope_width(self) -> int:
        return 0 if self.rope is None else self.buffers[self.rope].width

    @property
    def q_width(self) -> int:
        """Width of a query row: nope then rope."""
        return self.k_width + self.rope_width

    @property
    def v_width(self) -> int:
        return self.v.width

    @property
    def tied(self) -> bool:
        """K and V overlap in one buffer, so that a loaded tile serves as both."""
        same = self.k.buffer == self.v.buffer
        return same and self.k.begin < self.v.end and self.v.begin < self.k.end

    @cached_property
    def scaled(self) -> tuple[int, ...]:
        """Numbers of the buffers that have scales."""
        return tuple(i for i, buffer in enumerate(self.buffers) if buffer.scaled)

    @cached_property
    def operands(self) -> tuple[int, ...]:
        """Which tensors of a layer stage 1 takes after q, in its order: the caches of K, V and rope
        (K's again where there is no rope), the scales of K and V, the sinks.

        A layer's tensors are its buffers, then the scales of those that have any, then the sinks.
        """
        rope = self.k.buffer if self.rope is None else self.rope
        numbers = [self.k.buffer, self.v.buffer, rope]
        first_scale = len(self.buffers)
        if self.scaled:
            scales = {buffer: first_scale + i for i, buffer in enumerate(self.scaled)}
            numbers += [scales[self.k.buffer], scales[self.v.buffer]]
        return (*numbers, first_scale + len(self.scaled)) if self.sinks else tuple(numbers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token of one layer takes."""
        return sum(b.heads * b.width * DTYPE_BYTES[b.dtype] for b in self.buffers)

    @cached_property
    def slug(self) -> str:
        """The full canonical form, safe as a file name."""
        return str(self).replace("=", "").translate(str.maketrans(":,*", "--x"))

    @classmethod
    def gqa(
        cls,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: Dtype = "float32",
        kv_dtype: CacheDtype | None = None,
        scale: float | None = None,
        **options: Unpack[Options],
    ) -> AttentionSpec:
        """Grouped-query attention; MHA with as many KV heads as query heads, MQA with one.

        `scale` defaults to ``head_dim ** -0.5`` (Vaswani et al. 2017, section 3.2.1), `kv_dtype`,
        of what is cached, to `dtype`. Every constructor takes the fields in `Options` as well.
        """
        if head_dim < 1:
            raise SpecError(f"head_dim is {head_dim}; expected 1 or more")
        cached = kv_dtype or dtype
        buffers = tuple(CacheBuffer(name, num_kv_heads, head_dim, cached) for name in ("k", "v"))
        return cls(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            buffers=buffers,
            k=Region(0, 0, head_dim),
            v=Region(1, 0, head_dim),
            scale=head_dim**-0.5 if scale is None else scale,
            dtype=dtype,
            **options,
        )

    @classmethod
    def mla(
        cls,
        *,
        num_q_heads: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        qk_nope_head_dim: int | None = None,
        dtype: Dtype = "float32",
        kv_dtype: CacheDtype | None = None,
        rope_dtype: Dtype | None = None,
        scale: float | None = None,
        **options: Unpack[Options],
    ) -> AttentionSpec:
        """Multi-head latent attention, absorbed (DeepSeek-V2, section 2.1 and appendix C).

        Every query head reads the one latent, of `kv_lora_rank` elements, as K and as V, and the
        one rotated key of `qk_rope_head_dim`. A query is ``W_UKᵀ q_nope ⊕ q_rope``; ``W_UV`` is
        left to the caller, after the merge. `scale` defaults to
        ``(qk_nope_head_dim + qk_rope_head_dim) ** -0.5``, of widths before absorption; where YaRN
        stretches the context, the model's factor belongs in it.
        """
        return cls.gla(
            num_q_heads=num_q_heads,
            num_latent_heads=1,
            latent_dim=kv_lora_rank,
            rope_dim=qk_rope_head_dim,
            nope_dim=qk_nope_head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            rope_dtype=rope_dtype,
            scale=scale,
            **options,
        )

    @classmethod
    def gla(
        cls,
        *,
        num_q_heads: int,
        num_latent_heads: int,
        latent_dim: int,
        rope_dim: int,
        nope_dim: int | None = None,
        rope_heads: int = 1,
        dtype: Dtype = "float32",
        kv_dtype: CacheDtype | None = None,
        rope_dtype: Dtype | None = None,
        scale: float | None = None,
        **options: Unpack[Options],
    ) -> AttentionSpec:
        """Grouped latent attention, absorbed (arXiv 2505.21487, section 3.3.2).

        Query heads in groups read a latent head each, of `latent_dim` elements, and all of them the
        one rotated key, of which some caches hold a copy for each latent (`rope_heads`). `scale`
        defaults to ``(nope_dim + rope_dim) ** -0.5``, of widths before absorption.
        """
        if scale is None:
            if nope_dim is None:
                raise SpecError(
                    "scale and the nope width are None; expected one, since the width of an "
                    "absorbed key does not tell the scale"
                )
            if nope_dim + rope_dim < 1:
                raise SpecError(
                    f"the nope width is {nope_dim} beside a rope of {rope_dim}; expected 1 or more "
                    f"together"
                )
            scale = (nope_dim + rope_dim) ** -0.5
        return cls(
            num_q_heads=num_q_heads,
            num_kv_heads=num_latent_heads,
            buffers=_state_and_rope(
                num_latent_heads,
                latent_dim,
                kv_dtype or dtype,
                rope_dim,
                rope_heads,
                rope_dtype or dtype,
            ),
            k=Region(0, 0, latent_dim),
            v=Region(0, 0, latent_dim),
            rope=1 if rope_dim else None,
            scale=scale,
            dtype=dtype,
            **options,
        )

    @classmethod
    def gta(
        cls,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_dim: int,
        dtype: Dtype = "float32",
        kv_dtype: CacheDtype | None = None,
        rope_dtype: Dtype | None = None,
        scale: float | None = None,
        **options: Unpack[Options],
    ) -> AttentionSpec:
        """Grouped-tied attention (arXiv 2505.21487, section 3.3.1).

        A state of `head_dim` elements for each KV head is V; without its last `rope_dim` elements
        it is also K, to which the one rotated key of all heads is appended. `scale` defaults to
        ``head_dim ** -0.5``, rope included.
        """
        if not 0 <= rope_dim < head_dim:
            raise SpecError(f"rope_dim is {rope_dim}; expected less than head_dim, {head_dim}")
        return cls(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            buffers=_state_and_rope(
                num_kv_heads, head_dim, kv_dtype or dtype, rope_dim, 1, rope_dtype or dtype
            ),
            k=Region(0, 0, head_dim - rope_dim),
            v=Region(0, 0, head_dim),
            rope=1 if rope_dim else None,
            scale=head_dim**-0.5 if scale is None else scale,
            dtype=dtype,
            **options,
        )

    def shard(self, rank: int, world: int) -> AttentionSpec:
        """The part of one of `world` tensor-parallel ranks (arXiv 2505.21487, section 3.2).

        Query heads are divided. KV or latent heads are divided too while there are enough; beyond
        that each is copied to several ranks, whose query heads all use that one (`heads_of_shard`
        says which). A rope that all heads share is on every rank.

        Raises:
            SpecError: `rank` is none of `world`, or heads do not divide.
        """
        kv_begin, kv_end = self.heads_of_shard(rank, world)
        kv_heads = kv_end - kv_begin
        buffers = tuple(
            replace(b, heads=kv_heads if b.heads == self.num_kv_heads else b.heads)
            for b in self.buffers
        )
        return replace(
            self, num_q_heads=self.num_q_heads // world, num_kv_heads=kv_heads, buffers=buffers
        )

    def heads_of_shard(self, rank: int, world: int) -> tuple[int, int]:
        """First and one past the last KV head of a rank; its query heads are the rank's share.

        Raises:
            SpecError: as `shard`.
        """
        if not 0 <= rank < world:
            raise SpecError(f"rank is {rank}; expected one of 0 to {world - 1}")
        fits = self.num_kv_heads % world == 0 or world % self.num_kv_heads == 0
        if self.num_q_heads % world or not fits:
            raise SpecError(
                f"world is {world}; expected a divisor of num_q_heads, which is "
                f"{self.num_q_heads}, that divides num_kv_heads, which is {self.num_kv_heads}, or "
                f"is a multiple of it"
            )
        begin = rank * self.num_kv_heads // world
        return begin, begin + max(1, self.num_kv_heads // world)

    @classmethod
    def parse(cls, text: str) -> AttentionSpec:
        """The spec that ``gqa:hq=32,hkv=8,d=128,dtype=bf16,page=16,layout=nhd`` or the like spells.

        The inverse of ``str(spec)``; see `deft_tvm.notation`.

        Raises:
            SpecError: `text` is no spec.
        """
        from deft_tvm.notation import parse_spec

        return parse_spec(text)

    def __str__(self) -> str:
        from deft_tvm.notation import format_spec

        return format_spec(self)


@dataclass(frozen=True, slots=True)
class TileShape:
    """A tile class: what one work item may hold, and in which type its products are taken.

    Attributes:
        lane_rows: most lane rows (query rows × group) of an item.
        kv_tile: tokens that the online softmax walks in one step.
        operand: element type of both factors of both products; accumulation is float32.
        heads: KV heads that a unit of work takes through each step one after another, a divisor of
            `AttentionSpec.num_kv_heads`. Their elements of a token lie side by side in a cache, so
            that it is read as it lies, and a rope that they share once.
    """

    lane_rows: int
    kv_tile: int
    operand: Dtype
    heads: int = 1

    @property
    def name(self) -> str:
        heads = f"h{self.heads}" if self.heads > 1 else ""
        return f"r{self.lane_rows}t{self.kv_tile}{SHORT_DTYPE[self.operand]}{heads}"


def _state_and_rope(
    heads: int,
    width: int,
    dtype: CacheDtype,
    rope_dim: int,
    rope_heads: int,
    rope_dtype: Dtype,
) -> tuple[CacheBuffer, ...]:
    """The caches of a variant whose K and V are one state; without a rope only that."""
    state = CacheBuffer("state", heads, width, dtype)
    rope = CacheBuffer("rope", rope_heads, rope_dim, rope_dtype)
    return (state, rope) if rope_dim else (state,)
