"""When a call may go straight to the kernels, past torch's dispatcher.

The dispatcher costs as much as the call of a kernel. It must be passed where torch has to see the
operator: under a dispatch mode (fake tensors, tracing), a transformation (functionalization, vmap),
a profiler or derivatives forwards, and for tensors that are not what they seem (subclasses, negated
views, those without data). The first two show as keys that the thread adds to every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

try:
    from torch._C import _dispatch_tls_local_include_set as _keys_of_thread
    from torch.autograd import _profiler_enabled as _profiling
    from torch.autograd import forward_ad

    _ = forward_ad._current_level

    TELLING = True
except (ImportError, AttributeError):
    TELLING = False
"""Whether this torch tells what is on: the names are its own. Where not, no call is plain."""

_PLAIN = (Tensor, Parameter)


def _keys_without_modes() -> frozenset[int]:
    """What a thread adds to a call where nothing is on but, maybe, inference mode."""
    found: set[int] = set()
    if not TELLING:
        return frozenset()
    for mode in (False, True):
        with torch.inference_mode(mode):
            found.add(_keys_of_thread().raw_repr())
    return frozenset(found)


_WITHOUT_MODES = _keys_without_modes()


def is_plain(q: Tensor, kv: Sequence[Tensor], out: Tensor | None, lse: Tensor | None) -> bool:
    """Whether the dispatcher would hand these to the CPU's implementation just as they are; not
    where `q` or something in `kv` is no tensor."""
    if not TELLING or _keys_of_thread().raw_repr() not in _WITHOUT_MODES:
        return False
    if _profiling() or forward_ad._current_level >= 0:
        return False
    given = (q, *kv)
    if out is not None:
        given = (*given, out)
    if lse is not None:
        given = (*given, lse)
    for tensor in given:
        if type(tensor) not in _PLAIN or not tensor.is_cpu or tensor.is_neg():
            return False
    return True
