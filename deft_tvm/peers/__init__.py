"""What else a torch user could compute tree attention with, each way at its best setting."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from deft_tvm.peers.cascade import CASCADE
from deft_tvm.peers.flashinfer import FLASHINFER
from deft_tvm.peers.flex import FLEX
from deft_tvm.peers.gathered import Gathered, Sequences
from deft_tvm.peers.peer import Call, Peer
from deft_tvm.peers.sdpa import SDPA
from deft_tvm.peers.triton import TRITON
from deft_tvm.peers.tvm_tree import TVM

PEERS: dict[str, Peer] = {**SDPA, **CASCADE, **FLEX, **TVM}
"""Those for a GPU where torch finds one."""
if torch.cuda.is_available():
    PEERS |= FLASHINFER
    if find_spec("triton") is not None:
        PEERS |= TRITON
QUICK = (*SDPA, *CASCADE)
"""Those that need no compilation."""

__all__ = [
    "FLASHINFER",
    "PEERS",
    "QUICK",
    "SDPA",
    "TRITON",
    "Call",
    "Gathered",
    "Peer",
    "Sequences",
]
