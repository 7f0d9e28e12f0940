"""Loaded modules by key: the string by which an operator names one, here and in another process.

A key is ``<spec>#<tile>+<tile>...``, and ends in ``@<folder>`` where the module was given by its
path; otherwise the best module of the process that resolves it is taken. The tile classes belong
to it since plan arrays are made for them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import tvm_ffi
from numpy.typing import NDArray

from deft_tvm.artifact import Artifact, find
from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.errors import ArtifactError
from deft_tvm.spec import AttentionSpec, TileShape

FIRST_STAGE, SECOND_STAGE = 1, 2
BOTH = FIRST_STAGE | SECOND_STAGE
CHECKED = 4

_ROWS, _NEEDED = -1, -2


class Loaded:
    """What a call needs of an artifact, looked up once.

    Attributes:
        artifact: the module and its manifest.
        spec: the attention.
        num_tiles: how many tile classes it has kernels for.
        run: both stages by one plan, or one of them: ``run(stages, *arguments)``, with
            `FIRST_STAGE`, `SECOND_STAGE` or `BOTH`, and `deft_tvm.pytorch.ops.arguments`. With
            `CHECKED`, for caches with pages that are not in 8 bits, it answers False and does
            nothing where `deft_tvm.pytorch.checks` would refuse a tensor.
        caches: how many of a layer's tensors are cache buffers.
        tensors: how many there are.
        scaled: the places of scales among the layer's tensors, and which buffer each is for.
        dtype: of q and out.
        q_shape: of q, all but its rows.
        partial_shape: of a partial, and of out all but its rows.
        cache_dtypes: of each cache buffer.
        page_shapes: of each cache buffer all but its pages.
        token_shapes: of each cache buffer without pages all but its tokens.
    """

    def __init__(self, artifact: Artifact) -> None:
        spec = artifact.spec
        self.artifact = artifact
        self.spec = spec
        self.num_tiles = len(artifact.tiles)
        self.caches = len(spec.buffers)
        self.scaled = tuple(enumerate(spec.scaled, self.caches))
        self.tensors = self.caches + len(self.scaled) + spec.sinks
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.q_shape = (spec.num_q_heads, spec.q_width)
        self.partial_shape = (spec.num_q_heads, spec.v_width)
        self.cache_dtypes: tuple[torch.dtype, ...] = tuple(
            getattr(torch, buffer.dtype) for buffer in spec.buffers
        )
        self.page_shapes = tuple(
            (spec.page_size, b.heads, b.width)
            if spec.layout == "NHD"
            else (b.heads, spec.page_size, b.width)
            for b in spec.buffers
        )
        self.token_shapes = tuple((buffer.heads, buffer.width) for buffer in spec.buffers)
        self._wanted = _wanted(self)
        self.run: tvm_ffi.Function = artifact.runner(self._wanted.ctypes.data)


def _wanted(loaded: Loaded) -> NDArray[np.int64]:
    """int64[tensors, 8], of out, lse, q and the operands: code and bits of the dtype, whether it
    has to be contiguous, the number of dimensions, and their sizes or what stands for them."""
    spec = loaded.spec
    out = (spec.dtype, True, (_ROWS, *loaded.partial_shape))
    lse = ("float32", True, (_ROWS, spec.num_q_heads))
    q = (spec.dtype, False, (_ROWS, *loaded.q_shape))
    layer: list[tuple[str, bool, tuple[int, ...]]] = [
        (buffer.dtype, False, (_NEEDED, *shape))
        for buffer, shape in zip(spec.buffers, loaded.page_shapes, strict=True)
    ]
    # Scales have shapes of two kinds, and are checked in Python alone.
    layer += [("float32", False, (_NEEDED, 1))] * len(spec.scaled)
    layer += [("float32", True, (spec.num_q_heads,))] * spec.sinks
    tensors = (out, lse, q, *(layer[number] for number in spec.operands))
    return np.array([_entry(*tensor) for tensor in tensors], np.int64)


def _entry(dtype: str, whole: bool, shape: tuple[int, ...]) -> list[int]:
    made, sizes = tvm_ffi.dtype(dtype), [*shape, *[0] * (4 - len(shape))]
    return [made.type_code, made.bits, whole, len(shape), *sizes]


def make_key(spec: AttentionSpec, tiles: tuple[TileShape, ...], directory: Path | None) -> str:
    """The key of a module; `directory` where it must be this one and not the best."""
    names = "+".join(tile.name for tile in tiles)
    return f"{spec}#{names}" + ("" if directory is None else f"@{directory}")


@cache
def spec_of(key: str) -> AttentionSpec:
    """The attention that a key names; loads nothing."""
    return AttentionSpec.parse(key.partition("#")[0])


def remember(key: str, kind: str, artifact: Artifact) -> Loaded:
    """Let `resolve` answer with `artifact`, so that a module is not looked for twice."""
    loaded = _resolved[key, kind] = Loaded(artifact)
    return loaded


def resolve(key: str, kind: str) -> Loaded:
    """The module of a key, on a device of `kind`.

    Raises:
        ArtifactError: it cannot be loaded here, or has other tile classes.
        CompilerMissing: there is none, and no compiler to build one.
    """
    return _resolved.get((key, kind)) or remember(key, kind, _load(key, kind))


_resolved: dict[tuple[str, str], Loaded] = {}


def _load(key: str, kind: str) -> Artifact:
    tiles, _, directory = key.partition("#")[2].partition("@")
    spec, device = spec_of(key), DeviceProfile.detect(cast(Kind, kind))
    artifact = Artifact.load(directory, device, spec) if directory else find(spec, device)
    names = "+".join(tile.name for tile in artifact.tiles)
    if names != tiles:
        raise ArtifactError(
            f"{artifact.directory}: tile classes are {names}; expected {tiles}, "
            f"for which the plan was made: export the program again"
        )
    return artifact
