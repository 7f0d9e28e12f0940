"""The one-line form of a spec: users type it, logs and manifests keep it, folders are named by it.

    gqa:hq=32,hkv=8,d=128,dtype=bf16,page=16,layout=nhd
    kv:hq=4,hkv=2,buffers=state*2*80*f32+rope*1*16*f32,k=0*0*64,v=0*0*80,rope=1,scale=0.1,dtype=f32,…

``gqa`` is grouped-query attention; ``kv`` spells every region of the one formula out: a buffer is
``name*heads*width*dtype``, a region ``buffer*begin*end``. Every field has one spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from deft_tvm.errors import SpecError
from deft_tvm.spec import (
    LONG_DTYPE,
    SHORT_DTYPE,
    AttentionSpec,
    CacheBuffer,
    Dtype,
    Layout,
    Region,
)

T = TypeVar("T")

EXAMPLE = "gqa:hq=32,hkv=8,d=128,dtype=bf16,page=16,layout=nhd"
_STORAGE = ("dtype", "page", "layout", "scale")
_REQUIRED = {
    "gqa": ("hq", "hkv", "d"),
    "kv": ("hq", "hkv", "buffers", "k", "v", "scale"),
}
_KNOWN = {
    "gqa": (*_REQUIRED["gqa"], *_STORAGE),
    "kv": ("hq", "hkv", "buffers", "k", "v", "rope", *_STORAGE),
}


def format_spec(spec: AttentionSpec) -> str:
    """The canonical one-line form of `spec`."""
    plain = _plain_gqa(spec)
    storage = {
        "dtype": SHORT_DTYPE[spec.dtype],
        "page": str(spec.page_size),
        "layout": spec.layout.lower(),
    }
    heads = {"hq": str(spec.num_q_heads), "hkv": str(spec.num_kv_heads)}
    if plain is not None:
        scale = {} if spec == plain else {"scale": repr(spec.scale)}
        return _join("gqa", heads | {"d": str(spec.k_width)} | storage | scale)
    regions = {
        "buffers": "+".join(
            f"{b.name}*{b.heads}*{b.width}*{SHORT_DTYPE[b.dtype]}" for b in spec.buffers
        ),
        "k": f"{spec.k.buffer}*{spec.k.begin}*{spec.k.end}",
        "v": f"{spec.v.buffer}*{spec.v.begin}*{spec.v.end}",
    }
    rope = {} if spec.rope is None else {"rope": str(spec.rope)}
    return _join("kv", heads | regions | rope | storage | {"scale": repr(spec.scale)})


def parse_spec(text: str) -> AttentionSpec:
    """The spec that `text` spells; the inverse of `format_spec`.

    Fields may come in any order; ``dtype``, ``page``, ``layout`` and, for ``gqa``, ``scale`` have
    defaults (f32, 16, nhd, ``d ** -0.5``).

    Raises:
        SpecError: says which part of the text was expected to be what.
    """
    kind, _, body = text.partition(":")
    if kind not in _KNOWN:
        raise SpecError(
            f"spec {text!r} starts with {kind!r}; expected gqa or kv, as in {EXAMPLE!r}"
        )
    fields = _Fields(text, kind, body)
    num_q_heads, num_kv_heads = fields["hq", int], fields["hkv", int]
    dtype: Dtype = fields.get("dtype", _dtype, "float32")
    layout: Layout = fields.get("layout", _layout, "NHD")
    page_size = fields.get("page", int, 16)
    if kind == "gqa":
        return AttentionSpec.gqa(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=fields["d", int],
            dtype=dtype,
            page_size=page_size,
            layout=layout,
            scale=fields["scale", float] if "scale" in fields.values else None,
        )
    return AttentionSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        buffers=fields["buffers", _buffers],
        k=fields["k", _region],
        v=fields["v", _region],
        rope=fields["rope", int] if "rope" in fields.values else None,
        scale=fields["scale", float],
        dtype=dtype,
        page_size=page_size,
        layout=layout,
    )


class _Fields:
    """The ``name=value`` parts of a spec, each at most once and known to its kind."""

    def __init__(self, text: str, kind: str, body: str) -> None:
        self.text = text
        self.values: dict[str, str] = {}
        for part in filter(None, body.split(",")):
            name, _, value = part.partition("=")
            if name not in _KNOWN[kind] or name in self.values or not value:
                raise SpecError(
                    f"spec {text!r} has {part!r}; expected each of {', '.join(_KNOWN[kind])} "
                    f"at most once, as in {EXAMPLE!r}"
                )
            self.values[name] = value
        if missing := [name for name in _REQUIRED[kind] if name not in self.values]:
            raise SpecError(f"spec {text!r} lacks {', '.join(missing)}; expected {EXAMPLE!r}")

    def __getitem__(self, key: tuple[str, Callable[[str], T]]) -> T:
        name, read = key
        try:
            return read(self.values[name])
        except (ValueError, KeyError):
            wanted = {int: "an integer", float: "a number"}.get(read, read.__doc__)  # type: ignore[call-overload]
            raise SpecError(
                f"spec {self.text!r}: {name} is {self.values[name]!r}; expected {wanted}"
            ) from None

    def get(self, name: str, read: Callable[[str], T], default: T) -> T:
        return self[name, read] if name in self.values else default


def _dtype(text: str) -> Dtype:
    """f32, f16 or bf16"""
    return cast(Dtype, LONG_DTYPE[text])


def _layout(text: str) -> Layout:
    """nhd or hnd"""
    return cast(Layout, {"nhd": "NHD", "hnd": "HND"}[text])


def _region(text: str) -> Region:
    """buffer*begin*end"""
    buffer, begin, end = text.split("*")
    return Region(int(buffer), int(begin), int(end))


def _buffers(text: str) -> tuple[CacheBuffer, ...]:
    """name*heads*width*dtype, joined by +"""
    parts = (part.split("*") for part in text.split("+"))
    return tuple(
        CacheBuffer(name, int(heads), int(width), _dtype(dtype))
        for name, heads, width, dtype in parts
    )


def _plain_gqa(spec: AttentionSpec) -> AttentionSpec | None:
    """The grouped-query attention of the same shape, if `spec` is one up to its scale."""
    plain = AttentionSpec.gqa(
        num_q_heads=spec.num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.k_width,
        dtype=spec.dtype,
        page_size=spec.page_size,
        layout=spec.layout,
    )
    same = (plain.buffers, plain.k, plain.v, plain.rope) == (
        spec.buffers,
        spec.k,
        spec.v,
        spec.rope,
    )
    return plain if same else None


def _join(kind: str, fields: dict[str, str]) -> str:
    return f"{kind}:" + ",".join(f"{name}={value}" for name, value in fields.items())
