"""Random operations on page pools, as many as are asked for, other ones each time; a script.

python tests/fuzz_pool.py 100000
"""

from __future__ import annotations

import sys

from hypothesis.stateful import run_state_machine_as_test
from pool_machine import PoolMachine, many

if __name__ == "__main__":
    run_state_machine_as_test(PoolMachine, settings=many(int(sys.argv[1]), derandomize=False))
    print(f"{PoolMachine.operations} operations")
