"""Tree attention as users call it: plan once a step, run in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from deft_tvm.artifact import Artifact, find
from deft_tvm.device import DeviceProfile, Kind
from deft_tvm.errors import InputError, PlanError
from deft_tvm.files import AnyPath
from deft_tvm.finding import check_fits
from deft_tvm.pages import PageTable
from deft_tvm.plan import Plan, Recipe, Traffic, make_recipe, traffic
from deft_tvm.pytorch.checks import check_plan, check_types
from deft_tvm.pytorch.eager import is_plain
from deft_tvm.pytorch.gradients import check_no_gradient, check_no_tangent
from deft_tvm.pytorch.loaded import make_key, remember
from deft_tvm.pytorch.ops import TREE_ATTENTION, TREE_ATTENTION_OUT, Operands, attend, outputs
from deft_tvm.pytorch.plan_tensors import PlanTensors
from deft_tvm.pytorch.watch import Asked, Watch
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.tuning.log import measured


class _Step(NamedTuple):
    """A plan and what its runs need of it."""

    plan: Plan
    tensors: PlanTensors
    watch: Watch | None


class TreeAttention:
    """Exact attention over a forest of token trees; one for all layers with the same spec.

    Attributes:
        spec: the attention.
        artifact: the module that runs.
        device: where plans and tensors live.
        profile: rates of the device, by which plans are chosen.
        grouping: how forests are divided into work, see `deft_tvm.plan.make_plan`.
        deterministic: whether a row's bits depend on its own tree alone.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        module: AnyPath | Artifact | None = None,
        device: torch.device | str | None = None,
        *,
        deterministic: bool = False,
        grouping: str = "auto",
    ) -> None:
        """Takes the best module for `spec` and the device, or builds and caches the default.

        Args:
            spec: the attention.
            module: this one instead: an artifact, or its folder.
            device: ``cpu`` (the default, or what `module` is for) or ``cuda``.
            deterministic: see the attributes.
            grouping: see the attributes.

        Raises:
            ArtifactError: the module is damaged, or not for this spec or device.
            CompilerMissing: there is no module, and no compiler to build one.
            InputError: `spec` is none, or `device` is none of those, or a GPU, and torch sees none.
            PlanError: there is no such grouping, or it is not deterministic.
            LogError: the device's measured rates cannot be read.
        """
        if not isinstance(spec, AttentionSpec):
            raise InputError(
                f"spec is {spec!r}; expected an AttentionSpec, as AttentionSpec.parse reads one"
            )
        self.spec = spec
        self.device = _device(device or _kind_of(module))
        kind = self.device.type
        self.profile = measured(DeviceProfile.detect(cast(Kind, kind)))
        self.artifact = _artifact(spec, module, self.profile)
        self._away = None if kind == "cpu" else self.device
        self.deterministic = deterministic
        self.grouping = grouping
        self._asked = Asked.now()
        self._step: _Step | None = None
        self._recipes: dict[tuple[str, bool], Recipe] = {}
        self._directory = None if module is None else self.artifact.directory
        self._key = make_key(spec, self.artifact.tiles, self._directory)
        self._loaded = remember(self._key, kind, self.artifact)
        # Outside of any program: before Python 3.12 it takes a lock, which Dynamo cannot trace.
        _ = spec.scaled
        self._new_recipe()

    def __repr__(self) -> str:
        return f"TreeAttention({str(self.spec)!r}, {str(self.device)!r}, plan={self.last_plan})"

    def copy(self) -> TreeAttention:
        """The same attention by the same module, without a plan: it may follow another one."""
        made = self.__copy__()
        made._step = None
        return made

    def __copy__(self) -> TreeAttention:
        """It goes on following this plan, until it has one of its own."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> TreeAttention:
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process: the same attention without a plan, by the module in the same folder,
        or by the best one there is, if this one was not told which to take."""
        made = partial(type(self), deterministic=self.deterministic, grouping=self.grouping)
        return made, (self.spec, self._directory, self.device)

    def plan(
        self,
        forest: Forest,
        page_indices: ArrayLike | Tensor | PageTable | None = None,
        page_indptr: ArrayLike | Tensor | None = None,
        first_slot: ArrayLike | Tensor | None = None,
    ) -> Plan:
        """Plan one step; all runs until the next plan or update follow it.

        Args:
            forest: the trees, with lengths and rows.
            page_indices: int[P], pages of all nodes, end to end, or a whole `PageTable`. None:
                the cache has no pages, and nodes lie in it back to back in the caller's order.
            page_indptr: int[nodes + 1], node i's pages are
                ``page_indices[page_indptr[i]:page_indptr[i + 1]]``.
            first_slot: int[nodes], slot of the node's first token in the first of them, by
                default 0.

        Raises:
            PageError: the pages do not hold the forest's tokens.
            PlanError: the grouping does not fit.
            InputError: `forest` is none, or a page table's parts are not all there.
        """
        if not isinstance(forest, Forest):
            raise InputError(f"forest is {_what(forest)}; expected a deft_tvm.Forest")
        pages = _page_table(self.spec, forest, page_indices, page_indptr, first_slot)
        recipe = self._recipes.get((self.grouping, self.deterministic)) or self._new_recipe()
        return self._follow(recipe(forest, pages))

    def _new_recipe(self) -> Recipe:
        """Of plans as the attributes say now."""
        made = self._recipes[self.grouping, self.deterministic] = make_recipe(
            self.spec,
            self.artifact.tiles,
            self.profile,
            grouping=self.grouping,
            deterministic=self.deterministic,
            planner=self.artifact.planner,
        )
        return made

    def update(
        self,
        lengths: ArrayLike | Tensor | Forest | None = None,
        page_indices: ArrayLike | Tensor | PageTable | None = None,
        page_indptr: ArrayLike | Tensor | None = None,
        first_slot: ArrayLike | Tensor | None = None,
    ) -> Plan:
        """Plan the next step where only lengths or pages changed, with the grouping as it was.

        Args:
            lengths: int[nodes], KV tokens of each node, or a forest with the same parents and
                rows; None: as they were.
            page_indices: as in `plan`; None: pages as they were.
            page_indptr: as in `plan`.
            first_slot: as in `plan`.

        Raises:
            PlanError: nothing was planned yet, or parents or rows changed.
            TreeError: the lengths do not fit the nodes.
            PageError: the pages do not hold the tokens.
            InputError: a page table's parts are not all there.
        """
        step = self._planned("update")
        forest, pages = step.plan.forest, step.plan.pages
        if isinstance(lengths, Forest):
            forest = lengths
        elif lengths is not None:
            forest = forest.with_lengths(_on_host(lengths))
        same = page_indices is None and page_indptr is None and first_slot is None
        if not same or pages.is_contiguous:
            pages = _page_table(self.spec, forest, page_indices, page_indptr, first_slot)
        return self._follow(step.plan.update(forest, pages))

    def use(self, plan: Plan) -> Plan:
        """Follow a plan that was made elsewhere, as for another spec of the same group and tiles.

        Args:
            plan: for the module's tile classes, the spec's group and its page size.

        Raises:
            PlanError: the plan is for others.
            InputError: `plan` is none.
        """
        if not isinstance(plan, Plan):
            raise InputError(f"plan is {_what(plan)}; expected a deft_tvm.Plan")
        check_plan(self.spec, self.artifact.tiles, plan)
        return self._follow(plan)

    def _follow(self, plan: Plan) -> Plan:
        watch = self._asked and self._asked.watch(self.spec, plan)
        self._step = _Step(plan, PlanTensors.of(plan, self._away), watch)
        return plan

    def run(
        self,
        q: Tensor,
        kv: Sequence[Tensor],
        out: Tensor | None = None,
        lse: Tensor | None = None,
        *,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of one layer; nothing is copied, and nothing allocated if `out` and `lse` are.

        Args:
            q: [R, query heads, q_width] in the spec's dtype, nope then rope, rows node by node in
                the caller's order; strides but the last are free.
            kv: the layer's cache in the order of ``spec.buffers``, each [pages, page_size, heads,
                width], with layout HND [pages, heads, page_size, width], or [tokens, heads, width]
                if the plan has no pages; strides but the last are free. Then, in the same order,
                the scales of those in ``float8_e4m3fn``, float32[heads] or float32[pages, heads]:
                see `deft_tvm.fp8.quantize`.
            out: [R, query heads, v_width] in q's dtype, contiguous, apart from q and `kv`; by
                default a new tensor.
            lse: [R, query heads], float32, contiguous, apart from all else; by default a new
                tensor.
            sinks: float32[query heads], where the spec has them: learned logits in the scale of the
                scaled scores, which take part in the softmax and have no value. States with sinks
                in them do not compose: where they are to be merged, leave them out of the spec
                and `apply_sinks` to what was merged.

        Returns:
            `out`, and `lse`: the natural logarithm of the sum of exponentials of the scaled
            logits. A row that sees nothing has zeros, and -inf or its sinks.

        Raises:
            PlanError: nothing was planned yet.
            InputError: a tensor does not fit the spec or the plan, or requires grad.
            ExactnessError: ``DEFT_TVM_CHECK`` is set, and the result is wrong.
        """
        step = self._planned("run")
        # Most calls. Whatever else is asked takes microseconds where layers empty the caches.
        usual = step.watch is None and sinks is None and not self.spec.sinks
        usual = usual and type(kv) in (tuple, list) and not torch.compiler.is_dynamo_compiling()
        if usual and is_plain(q, kv, out, lse):
            return attend(self._loaded, step.tensors, q, kv, out, lse)
        check_types(self.spec, q, kv, sinks, out=out, lse=lse)
        layer = kv if sinks is None else (*kv, sinks)
        if step.watch is not None and not torch.compiler.is_compiling():
            return step.watch.run(lambda: self._run(step, q, layer, out, lse), q, layer)
        return self._run(step, q, layer, out, lse)

    def _run(
        self, step: _Step, q: Tensor, kv: Sequence[Tensor], out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_dynamo_compiling() and is_plain(q, kv, out, lse):
            return attend(self._loaded, step.tensors, q, kv, out, lse)
        return self._dispatch(step, q, kv, out, lse)

    def _dispatch(
        self, step: _Step, q: Tensor, kv: Sequence[Tensor], out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """By the operators, which torch sees."""
        check_no_gradient(q, kv, out=out, lse=lse)
        if not torch.compiler.is_dynamo_compiling():
            check_no_tangent(q, kv)
        if out is None and lse is None:
            return cast(tuple[Tensor, Tensor], TREE_ATTENTION(q, kv, *self._operands(step)))
        out, lse = outputs(q, self.spec.v_width, out, lse)
        TREE_ATTENTION_OUT(q, kv, *self._operands(step), out, lse)
        return out, lse

    @property
    def last_plan(self) -> Plan | None:
        """The current plan; None before the first."""
        return None if self._step is None else self._step.plan

    @property
    def operands(self) -> Operands:
        """The current plan as ``torch.ops.deft_tvm.tree_attention(q, kv, *operands)`` takes it.

        Raises:
            PlanError: nothing was planned yet.
        """
        return self._operands(self._planned("operands"))

    def _operands(self, step: _Step) -> Operands:
        return Operands(step.tensors.plan, step.tensors.layout, self._key)

    @property
    def traffic(self) -> Traffic:
        """Bytes and FLOPs of one run of the current plan, and what sharing saves.

        Raises:
            PlanError: nothing was planned yet.
        """
        return traffic(self._planned("traffic").plan, self.spec)

    def _planned(self, caller: str) -> _Step:
        if self._step is None:
            raise PlanError(f"{caller} came before plan; expected a plan first")
        return self._step


def load(path: AnyPath, device: torch.device | str | None = None, **options: Any) -> TreeAttention:
    """Tree attention by an exported module.

    Args:
        path: the artifact's folder.
        device: by default what the module is for.
        options: ``deterministic`` and ``grouping`` of `TreeAttention`.

    Raises:
        ArtifactError: there is no module, or it does not run here.
    """
    artifact = Artifact.load(path)
    return TreeAttention(artifact.spec, artifact, device, **options)


def _device(given: torch.device | str) -> torch.device:
    try:
        made = torch.device(given)
    except (RuntimeError, TypeError):
        made = None
    if made is None or made.type not in get_args(Kind):
        raise InputError(f"device is {given!r}; expected cpu or cuda")
    return made


def _what(given: object) -> str:
    return "None" if given is None else type(given).__name__


def _kind_of(module: AnyPath | Artifact | None) -> str:
    if module is None:
        return "cpu"
    artifact = module if isinstance(module, Artifact) else Artifact.load(module)
    return artifact.manifest.device_kind


def _artifact(
    spec: AttentionSpec, module: AnyPath | Artifact | None, profile: DeviceProfile
) -> Artifact:
    if module is None:
        return find(spec, profile)
    if isinstance(module, Artifact):
        check_fits(module.directory, module.manifest, profile, spec)
        return module
    return Artifact.load(module, profile, spec)


def _page_table(
    spec: AttentionSpec,
    forest: Forest,
    page_indices: ArrayLike | Tensor | PageTable | None,
    page_indptr: ArrayLike | Tensor | None,
    first_slot: ArrayLike | Tensor | None,
) -> PageTable:
    if isinstance(page_indices, PageTable):
        if page_indptr is not None or first_slot is not None:
            raise InputError(
                "page_indptr or first_slot is given beside a PageTable; expected neither"
            )
        return page_indices
    if page_indices is None and (page_indptr is not None or first_slot is not None):
        raise InputError("page_indices is None beside page_indptr or first_slot; expected all")
    if page_indices is None:
        return PageTable.contiguous(forest)
    if page_indptr is None:
        raise InputError("page_indptr is None; expected where in page_indices each node begins")
    indices, indptr = _on_host(page_indices), _on_host(page_indptr)
    slots = None if first_slot is None else _on_host(first_slot)
    return PageTable(indices, indptr, slots, page_size=spec.page_size)


def _on_host(values: ArrayLike | Tensor) -> ArrayLike:
    return values.cpu().numpy() if isinstance(values, Tensor) else values
