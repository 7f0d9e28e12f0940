"""The one-line form of a spec: users type it, logs and manifests keep it, folders are named by it.

    gqa:hq=32,hkv=8,d=128,dtype=bf16,page=16,layout=nhd
    gta:hq=32,hkv=8,d=128,rope=64,dtype=bf16,page=16,layout=nhd
    mla:hq=128,d=512,rope=64,dtype=bf16,page=64,layout=nhd,scale=0.07216878364870322
    gla:hq=128,hkv=2,d=256,rope=64,dtype=bf16,page=64,layout=nhd,scale=0.07216878364870322
    kv:hq=4,hkv=2,buffers=state*2*80*f32+rope*1*16*f32,k=0*0*64,v=0*0*80,rope=1,scale=0.1,dtype=f32,…

The first four are the constructors of `AttentionSpec`; ``kv`` spells every region of the one
formula out: a buffer is ``name*heads*width*dtype``, a region ``buffer*begin*end``. Every field, and
every spec, has one spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from deft_tvm.dtypes import FP8, LONG_DTYPE, SHORT_DTYPE, CacheDtype, Dtype, Layout
from deft_tvm.errors import SpecError
from deft_tvm.spec import AttentionSpec, CacheBuffer, Region

T = TypeVar("T")
D = TypeVar("D")

EXAMPLE = "gqa:hq=32,hkv=8,d=128,dtype=bf16,page=16,layout=nhd"
_COMMON = ("dtype", "page", "layout", "window", "cap", "sinks", "scale")
_REQUIRED = {
    "gqa": ("hq", "hkv", "d"),
    "gta": ("hq", "hkv", "d", "rope"),
    "mla": ("hq", "d", "rope", "scale"),
    "gla": ("hq", "hkv", "d", "rope", "scale"),
    "kv": ("hq", "hkv", "buffers", "k", "v", "scale"),
}
_OPTIONAL = {
    "gqa": ("kv_dtype",),
    "gta": ("kv_dtype", "rope_dtype"),
    "mla": ("kv_dtype", "rope_dtype"),
    "gla": ("rope_heads", "kv_dtype", "rope_dtype"),
    "kv": ("rope",),
}
_KNOWN = {
    kind: tuple(dict.fromkeys((*required, *_OPTIONAL.get(kind, ()), *_COMMON)))
    for kind, required in _REQUIRED.items()
}


def format_spec(spec: AttentionSpec) -> str:
    """The canonical one-line form of `spec`: by its variant's name if it is one, else ``kv``."""
    for kind in ("gqa", "gta", "mla", "gla"):
        fields = _fields_as(kind, spec)
        if fields is not None:
            return _join(kind, fields)
    return _join("kv", _spelled_out(spec))


def parse_spec(text: str) -> AttentionSpec:
    """The spec that `text` spells; the inverse of `format_spec`.

    Fields may come in any order; ``dtype``, ``page``, ``layout`` and, for ``gqa`` and ``gta``,
    ``scale`` have defaults (f32, 16, nhd, ``d ** -0.5``), ``kv_dtype`` and
    ``rope_dtype`` are ``dtype``'s and ``rope_heads`` 1, ``cap``, a soft cap, and ``window`` are
    none, ``sinks`` no.

    Raises:
        SpecError: says which part of the text was expected to be what.
    """
    kind, _, body = text.partition(":")
    if kind not in _KNOWN:
        raise SpecError(
            f"spec {text!r} starts with {kind!r}; expected one of {', '.join(_KNOWN)}, as in "
            f"{EXAMPLE!r}"
        )
    return _READ[kind](_Fields(text, kind, body))


def _read_gqa(fields: _Fields) -> AttentionSpec:
    return AttentionSpec.gqa(
        num_q_heads=fields["hq", int],
        num_kv_heads=fields["hkv", int],
        head_dim=fields["d", int],
        kv_dtype=fields.get("kv_dtype", _cache_dtype, None),
        scale=fields.get("scale", float, None),
        **_common(fields),
    )


def _read_gta(fields: _Fields) -> AttentionSpec:
    return AttentionSpec.gta(
        num_q_heads=fields["hq", int],
        num_kv_heads=fields["hkv", int],
        head_dim=fields["d", int],
        rope_dim=fields["rope", int],
        kv_dtype=fields.get("kv_dtype", _cache_dtype, None),
        rope_dtype=fields.get("rope_dtype", _dtype, None),
        scale=fields.get("scale", float, None),
        **_common(fields),
    )


def _read_latent(fields: _Fields) -> AttentionSpec:
    return AttentionSpec.gla(
        num_q_heads=fields["hq", int],
        num_latent_heads=fields.get("hkv", int, 1),
        latent_dim=fields["d", int],
        rope_dim=fields["rope", int],
        rope_heads=fields.get("rope_heads", int, 1),
        kv_dtype=fields.get("kv_dtype", _cache_dtype, None),
        rope_dtype=fields.get("rope_dtype", _dtype, None),
        scale=fields["scale", float],
        **_common(fields),
    )


def _read_regions(fields: _Fields) -> AttentionSpec:
    return AttentionSpec(
        num_q_heads=fields["hq", int],
        num_kv_heads=fields["hkv", int],
        buffers=fields["buffers", _buffers],
        k=fields["k", _region],
        v=fields["v", _region],
        rope=fields.get("rope", int, None),
        scale=fields["scale", float],
        **_common(fields),
    )


_READ: dict[str, Callable[[_Fields], AttentionSpec]] = {
    "gqa": _read_gqa,
    "gta": _read_gta,
    "mla": _read_latent,
    "gla": _read_latent,
    "kv": _read_regions,
}


def _common(fields: _Fields) -> dict[str, Any]:
    """The fields that every kind has, as the constructors name them."""
    return {
        "dtype": fields.get("dtype", _dtype, "float32"),
        "page_size": fields.get("page", int, 16),
        "layout": fields.get("layout", _layout, "NHD"),
        "window": fields.get("window", int, None),
        "soft_cap": fields.get("cap", float, None),
        "sinks": fields.get("sinks", _flag, False),
    }


def _fields_as(kind: str, spec: AttentionSpec) -> dict[str, str] | None:
    """The fields of `spec` as a `kind`; None if they do not spell it."""
    rope = None if spec.rope is None else spec.buffers[spec.rope]
    fields = {"hq": str(spec.num_q_heads), "hkv": str(spec.num_kv_heads), "d": str(spec.v_width)}
    if kind == "mla":
        del fields["hkv"]
    cached = spec.buffers[spec.v.buffer].dtype
    if cached != spec.dtype:
        fields["kv_dtype"] = SHORT_DTYPE[cached]
    if kind != "gqa":
        fields["rope"] = str(spec.rope_width)
        if rope is not None and rope.dtype != spec.dtype:
            fields["rope_dtype"] = SHORT_DTYPE[rope.dtype]
    if kind == "gla" and rope is not None and rope.heads != 1:
        fields["rope_heads"] = str(rope.heads)
    fields |= _common_fields(spec)
    for spelled in (fields, fields | {"scale": repr(spec.scale)}):
        if set(_REQUIRED[kind]) <= spelled.keys() and _spells(kind, spelled, spec):
            return spelled
    return None


def _spells(kind: str, fields: dict[str, str], spec: AttentionSpec) -> bool:
    try:
        return parse_spec(_join(kind, fields)) == spec
    except SpecError:
        return False


def _spelled_out(spec: AttentionSpec) -> dict[str, str]:
    fields = {
        "hq": str(spec.num_q_heads),
        "hkv": str(spec.num_kv_heads),
        "buffers": "+".join(
            f"{b.name}*{b.heads}*{b.width}*{SHORT_DTYPE[b.dtype]}" for b in spec.buffers
        ),
        "k": f"{spec.k.buffer}*{spec.k.begin}*{spec.k.end}",
        "v": f"{spec.v.buffer}*{spec.v.begin}*{spec.v.end}",
    }
    rope = {} if spec.rope is None else {"rope": str(spec.rope)}
    return fields | rope | _common_fields(spec) | {"scale": repr(spec.scale)}


def _common_fields(spec: AttentionSpec) -> dict[str, str]:
    window = {} if spec.window is None else {"window": str(spec.window)}
    cap = {} if spec.soft_cap is None else {"cap": repr(spec.soft_cap)}
    sinks = {"sinks": "yes"} if spec.sinks else {}
    return {
        "dtype": SHORT_DTYPE[spec.dtype],
        "page": str(spec.page_size),
        "layout": spec.layout.lower(),
        **window,
        **cap,
        **sinks,
    }


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

    def get(self, name: str, read: Callable[[str], T], default: D) -> T | D:
        return self[name, read] if name in self.values else default


def _dtype(text: str) -> Dtype:
    """f32, f16 or bf16"""
    if text == SHORT_DTYPE[FP8]:
        raise ValueError
    return cast(Dtype, LONG_DTYPE[text])


def _cache_dtype(text: str) -> CacheDtype:
    """f32, f16, bf16 or e4m3"""
    return cast(CacheDtype, LONG_DTYPE[text])


def _flag(text: str) -> bool:
    """yes or no"""
    return {"yes": True, "no": False}[text]


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
        CacheBuffer(name, int(heads), int(width), _cache_dtype(dtype))
        for name, heads, width, dtype in parts
    )


def _join(kind: str, fields: dict[str, str]) -> str:
    return f"{kind}:" + ",".join(f"{name}={value}" for name, value in fields.items())
