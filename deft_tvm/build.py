"""From a spec and what tuning found to an artifact. Needs the compiler (the extra ``tune``).

One module holds the partial kernels of all tile classes and the merge, and what `deft_tvm.native`
brings: the planner, the run, and on a CPU torch's threads. Decisions come from the
tuning logs of the device if there are any, else they are the defaults that ship.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import tvm
from tvm import IRModule

from deft_tvm import env
from deft_tvm.debug import tell
from deft_tvm.device import DeviceProfile, required_features
from deft_tvm.errors import PlanError
from deft_tvm.manifest import (
    DEFAULT,
    Kernel,
    Manifest,
    TileKernel,
    cache_directory,
    check_place,
    installed_versions,
    write_artifact,
)
from deft_tvm.native import PLANNER, RUN, TORCH_POOL, compile_c
from deft_tvm.schedules import Decision, KernelTask, MergeTask, PartialTask, schedule
from deft_tvm.schedules.cpu.lowering import compile_cpu
from deft_tvm.schedules.cuda.lowering import compile_cuda, cuda_source
from deft_tvm.schedules.tiles import default_tiles
from deft_tvm.spec import AttentionSpec, TileShape
from deft_tvm.tuning.defaults import default_for
from deft_tvm.tuning.lines import Trial
from deft_tvm.tuning.log import TuningLog, best_of, find_logs


@dataclass(frozen=True)
class Decisions:
    """What was decided for each kernel of a module, by kernel name, and where that comes from.

    A kernel is named as in logs: the name of its tile, or ``merge``. Those not named take the
    defaults that ship, and what these leave open is the schedule's.
    """

    by_kernel: Mapping[str, Decision] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)


def tasks_for(
    spec: AttentionSpec, device: DeviceProfile, tiles: Sequence[TileShape] | None = None
) -> tuple[KernelTask, ...]:
    """The kernels of a module: one partial kernel for each tile class, then the merge."""
    target, features = device.target(), frozenset(device.features)
    tiles = default_tiles(spec, target["kind"], features) if tiles is None else tiles
    if spec.scaled and any(tile.operand == "float16" for tile in tiles):
        raise PlanError(
            "a tile's operand is float16; expected float32 or bfloat16 with caches in 8 bits, as "
            "probabilities times small scales are below float16's range"
        )
    threads = device.cores if device.kind == "cpu" else 1
    partials = (PartialTask(spec, target, features, tile, threads) for tile in tiles)
    return (*partials, MergeTask(spec, target, features))


def lower(tasks: Sequence[KernelTask], decisions: Decisions | None = None) -> IRModule:
    """The scheduled kernels of `tasks` in one module, not yet compiled."""
    decided = _completed(tasks, decisions or Decisions()).by_kernel
    module = IRModule()
    for task in tasks:
        module.update(_scheduled(task, decided[task.name]))
    return module


def _completed(tasks: Sequence[KernelTask], decisions: Decisions) -> Decisions:
    """With the default that ships for each kernel that nothing was decided for."""
    made = decisions.by_kernel
    missing = (task for task in tasks if task.name not in made)
    return Decisions({**made, **{t.name: default_for(t) for t in missing}}, decisions.origin)


def _scheduled(task: KernelTask, decision: Decision) -> IRModule:
    sch, knobs = schedule(task, decision)
    tell(3, f"{task.symbol}-schedule", lambda: f"# {knobs.taken}\n{sch.trace}", "py")
    tell(5, f"{task.symbol}-as-written", task.computation.script, "py")
    tell(5, f"{task.symbol}-scheduled", sch.mod.script, "py")
    return sch.mod


def compile_module(module: IRModule, target: Mapping[str, object]) -> tvm.runtime.Executable:
    """Compile scheduled kernels for `target`, as `DeviceProfile.target` gives it."""
    if target["kind"] == "cuda":
        return compile_cuda(module, str(target["arch"]))
    return compile_cpu(module, target)


def build(
    spec: AttentionSpec,
    device: DeviceProfile | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    tiles: Sequence[TileShape] | None = None,
    decisions: Decisions | None = None,
) -> Path:
    """Compile and export the module of `spec` for `device`.

    Args:
        spec: the attention.
        device: by default this machine's CPU.
        out: the artifact's folder, by default its place in the user's cache.
        tiles: tile classes, by default those that suit the spec and the device.
        decisions: by default the best of the device's tuning logs.

    Returns:
        The artifact's folder, complete.

    Raises:
        ArtifactError: `out` cannot be written, or holds something else; found before compiling.
        CompilerMissing: there is no C compiler to link with.
        LogError: one of the device's tuning logs cannot be read.
        PlanError: a decision is not among its schedule's candidates.
    """
    device = device or DeviceProfile.detect()
    directory = check_place(cache_directory(spec, device) if out is None else out)
    decisions = decisions or logged_decisions(spec, device)
    tasks = tasks_for(spec, device, tiles)
    decisions = _completed(tasks, decisions)
    on_cpu = device.kind == "cpu"
    sources = (*PLANNER, *RUN, *(TORCH_POOL if on_cpu else ()))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as beside:
        objects = beside.submit(compile_c, sources, scratch)
        executable = compile_module(lower(tasks, decisions), device.target())
        tell(
            4,
            "module-source",
            lambda: executable.mod.inspect_source("asm") if on_cpu else cuda_source(executable),
            "s" if on_cpu else "cu",
        )
        module_file = os.path.join(scratch, "module.so")
        executable.export_library(module_file, addons=objects.result())
        return write_artifact(directory, _manifest(spec, device, tasks, decisions), module_file)


def build_default(spec: AttentionSpec, device: DeviceProfile) -> Path:
    """The module that `artifact.find` makes where it found none: in the user's cache.

    Where defaults are asked for, it lies beside the tuned one and not in its place.
    """
    place = cache_directory(spec, device)
    untuned = place.with_name(f"{place.name}-untuned")
    return build(spec, device, out=untuned if env.UNTUNED.get() else place)


def logged_decisions(spec: AttentionSpec, device: DeviceProfile, *logs: TuningLog) -> Decisions:
    """The best decisions of `logs`, by default of the device's for `spec`; see `log.best_of`.

    Those of an older version may have choices that schedules no longer offer. Their kernels take
    the default, with a warning.
    """
    if env.UNTUNED.get():
        return Decisions()
    winners = dict(_offered(best_of(logs or find_logs(spec, device)), spec, device))
    return Decisions(
        {name: dict(trial.decision) for name, (_, trial) in winners.items()},
        {
            name: f"{log.directory.parent.name} trial {trial.trial}, {trial.time}"
            for name, (log, trial) in winners.items()
        },
    )


def _offered(
    winners: Mapping[str, tuple[TuningLog, Trial]], spec: AttentionSpec, device: DeviceProfile
) -> Iterator[tuple[str, tuple[TuningLog, Trial]]]:
    """Winners whose decision today's schedule of their kernel takes."""
    for task in tasks_for(spec, device) if winners else ():
        if task.name not in winners:
            continue
        log, trial = winners[task.name]
        try:
            schedule(task, trial.decision)
        except PlanError as error:
            text = f"{log.path}: {task.name}: {error}; the default is taken instead: tune again"
            warnings.warn(text, stacklevel=3)
        else:
            yield task.name, (log, trial)


def _manifest(
    spec: AttentionSpec,
    device: DeviceProfile,
    tasks: Sequence[KernelTask],
    decisions: Decisions,
) -> Manifest:
    target = device.target()
    *partials, merge = (_kernel(task, decisions) for task in tasks)
    tiles = tuple(
        TileKernel(
            function=kernel.function,
            decision=kernel.decision,
            tuned_from=kernel.tuned_from,
            lane_rows=task.tile.lane_rows,
            kv_tile=task.tile.kv_tile,
            operand=task.tile.operand,
            heads=task.tile.heads,
        )
        for task, kernel in zip(tasks, partials, strict=False)
        if isinstance(task, PartialTask)
    )
    return Manifest(
        spec=str(spec),
        tiles=tiles,
        merge=merge,
        target=target,
        required_features=required_features(target),
        device=device.slug,
        kind="cpu" if device.kind == "cpu" else _cuda_kind(),
        versions=installed_versions(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        needs=("torch_pool",) if device.kind == "cpu" else ("tvm_runtime",),
    )


def _kernel(task: KernelTask, decisions: Decisions) -> Kernel:
    return Kernel(
        function=task.symbol,
        decision=dict(decisions.by_kernel[task.name]),
        tuned_from=decisions.origin.get(task.name, DEFAULT),
    )


def _cuda_kind() -> Literal["cuda-cubin", "cuda-source"]:
    """TVM embeds a cubin where it sees a GPU, else source that is compiled at load."""
    return "cuda-cubin" if tvm.cuda(0).exist else "cuda-source"
