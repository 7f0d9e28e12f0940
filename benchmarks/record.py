# python benchmarks/record.py few_shot sequences overhead planning demo smollm2
# python benchmarks/record.py end_to_end -- --trees keyword.json
"""Run benchmarks and keep what they print under ``logs/<device>/benchmarks/``, with its origin."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from platformdirs import user_cache_path, user_data_path

from deft_tvm import DeviceProfile
from deft_tvm.manifest import source_commit

ROOT = Path(__file__).parents[1]
MODULES = {"demo": "deft_tvm.demo", "smollm2": "deft_tvm.demo.smollm2"}
"""What ``make run`` and ``make demo`` run."""


def folder() -> Path:
    """Where the records of this device are."""
    return ROOT / "logs" / DeviceProfile.detect().slug / "benchmarks"


def record(name: str, options: list[str]) -> None:
    """Run one benchmark, or a demo, and keep its output."""
    script = ["-m", MODULES[name]] if name in MODULES else [f"benchmarks/{name}.py"]
    run = subprocess.run(
        [sys.executable, *script, *options], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
    )
    when = datetime.now(timezone.utc).isoformat(timespec="minutes")
    made_of = f"commit {source_commit()}, torch {torch.__version__}"
    # A file is told by its name, wherever it lies here.
    told = " ".join([*script, *(Path(o).name if Path(o).is_file() else o for o in options)])
    origin = f"# python {told}\n# {when}, {made_of}\n"
    printed = run.stdout
    for place, kind in ((user_data_path, "data"), (user_cache_path, "cache")):
        printed = printed.replace(str(place("deft_tvm", appauthor=False)), f"<user {kind}>")
    folder().mkdir(parents=True, exist_ok=True)
    (folder() / f"{name}.txt").write_text(origin + printed, encoding="utf-8")
    print(run.stdout)


if __name__ == "__main__":
    names, _, asked = " ".join(sys.argv[1:]).partition(" -- ")
    for benchmark in names.split():
        record(benchmark, asked.split())
