"""What else a torch user could compute tree attention with, each way at its best setting."""

from __future__ import annotations

from deft_tvm.peers.cascade import CASCADE
from deft_tvm.peers.flex import FLEX
from deft_tvm.peers.gathered import Gathered, Sequences
from deft_tvm.peers.peer import Call, Peer
from deft_tvm.peers.sdpa import SDPA
from deft_tvm.peers.tvm_tree import TVM

PEERS: dict[str, Peer] = {**SDPA, **CASCADE, **FLEX, **TVM}
QUICK = (*SDPA, *CASCADE)
"""Those that need no compilation."""

__all__ = ["PEERS", "QUICK", "SDPA", "Call", "Gathered", "Peer", "Sequences"]
