"""Exported CPU modules run on torch's own OpenMP pool, and no compiler is needed to load them.

A second pool beside torch's would spin on the same cores: between two torch operators a kernel then
takes two to three times as long. So `native/torch_pool.c` is linked into every exported module, and
the loader hands it torch's own entry into OpenMP. ``torch.set_num_threads`` governs both.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache

from deft_tvm.device import permit_amx
from deft_tvm.errors import ArtifactError

# at::get_num_threads(): unlike omp_get_max_threads() it applies torch.set_num_threads also in a
# thread that has run no torch operator yet.
_COUNT_THREADS = "_ZN2at15get_num_threadsEv"


def adopt_pool(module: str | os.PathLike[str]) -> bool:
    """Let an exported module run on torch's pool, and use AMX; to be called once it is loaded.

    Returns False, and warns once, where torch has no OpenMP: the module then runs serially.

    Raises:
        ArtifactError: `module` was exported without the launcher.
    """
    library = ctypes.CDLL(os.fspath(module))
    if not hasattr(library, "deft_set_pool"):
        raise ArtifactError(f"module {module} has no deft_set_pool; expected a deft_tvm module")
    permit_amx()
    pool = _torch_pool()
    if pool is not None:
        library.deft_set_pool(*pool)
    return pool is not None


@cache
def _torch_pool() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """Addresses of OpenMP's fork-and-join call and of torch's count of threads."""
    import torch

    # A lookup through torch's extension walks its dependencies: it finds the very OpenMP library
    # that torch runs on, wherever a wheel or a distribution has put it.
    library = ctypes.CDLL(torch._C.__file__)
    count = _COUNT_THREADS if hasattr(library, _COUNT_THREADS) else "omp_get_max_threads"
    if not (hasattr(library, "GOMP_parallel") and hasattr(library, count)):
        warnings.warn("torch has no OpenMP pool here: kernels run on one thread", stacklevel=2)
        return None
    return _address(library, "GOMP_parallel"), _address(library, count)


def _address(library: ctypes.CDLL, symbol: str) -> ctypes.c_void_p:
    return ctypes.cast(getattr(library, symbol), ctypes.c_void_p)
