"""``python -m deft_tvm.gpu_check.tune``: decisions for this device, attention by attention.

The logs lie in the stage's folder as they do in ``logs/``; a second call goes on from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing

from deft_tvm.build import build, logged_decisions
from deft_tvm.errors import DeftError
from deft_tvm.gpu_check.arguments import deadline, kind_of, parser_of, use_logs
from deft_tvm.gpu_check.cells import SPEEDS
from deft_tvm.gpu_check.lines import last_line
from deft_tvm.spec import AttentionSpec
from deft_tvm.tuning.log import writable_root
from deft_tvm.tuning.probe import known_device
from deft_tvm.tuning.result import Progress, TuningResult
from deft_tvm.tuning.tune import WORKLOADS, local_runner, tune

SETTLE_SECONDS = 35.0
"""That measuring the best again and building the module take beside an attention's search."""


def main(specs: Sequence[str] = SPEEDS, workloads: Sequence[str] = WORKLOADS) -> None:
    """Tune each attention for its share of the time, and build its module."""
    parser = parser_of(__doc__)
    parser.add_argument("--spec", action="append", help="an attention; by default those of bench")
    parser.add_argument("--trials", type=int, help="for each, if it has so many before its time")
    asked = parser.parse_args()
    left = deadline(asked)
    # Where the environment names another folder, logs go there.
    use_logs(asked)
    root = writable_root()
    device = known_device(root, say, kind_of(asked))
    wanted = [AttentionSpec.parse(text) for text in asked.spec or specs]
    failed = 0
    with closing(local_runner(device)) as runner:
        for number, spec in enumerate(wanted):
            seconds = left() / (len(wanted) - number) - SETTLE_SECONDS
            if seconds <= 0:
                print(f"{len(wanted) - number} had no time; the same command goes on with them")
                failed += len(wanted) - number
                break
            print(f"{spec}: {seconds:.0f} s of search", flush=True)
            try:
                (found,) = tune(
                    [spec],
                    workloads,
                    trials=asked.trials,
                    minutes=seconds / 60,
                    device=device,
                    root=root,
                    listener=say,
                    runner=runner,
                )
                told(found)
                module = build(spec, device, decisions=logged_decisions(spec, device, found.log))
                print(f"module {module}", flush=True)
            except DeftError as error:
                print(f"failed {spec}: {last_line(error)}", flush=True)
                failed += 1
    sys.exit(1 if failed else 0)


def say(progress: Progress) -> None:
    """A line for each event."""
    print(f"{progress.phase}: {progress.text}", flush=True)


def told(found: TuningResult) -> None:
    """A line for each kernel, and where the log is."""
    for kernel in found.kernels.values():
        default = kernel.default_us
        gain = "" if default is None else f", {default / kernel.best_us:.2f}× the default"
        print(
            f"best {kernel.kernel} on {kernel.workload}: {kernel.best_us:.2f} µs{gain}, "
            f"{kernel.limit_us / kernel.best_us:.0%} of the limit, {kernel.trials} of "
            f"{kernel.decisions} tried: {dict(kernel.decision)}"
        )
    print(f"log {found.log.path}", flush=True)


if __name__ == "__main__":
    main()
