"""Random operations on page pools, as many as are asked for, other ones each time; a script.

python tests/fuzz_pool.py 100000
"""

from __future__ import annotations

import secrets
import sys

from pool_machine import PoolMachine, run

if __name__ == "__main__":
    first_seed = secrets.randbits(32)
    print(f"first seed {first_seed}")
    run(int(sys.argv[1]), first_seed)
    print(f"{PoolMachine.operations} operations")
