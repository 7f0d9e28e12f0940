"""The torch half: operators under compile and export, states, threads of plans, lazy names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from built import SMALL, artifact
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import deft_tvm
from deft_tvm import env, reference
from deft_tvm.errors import InputError
from deft_tvm.plan import Plan, make_plan
from deft_tvm.pytorch import TreeAttention, TreeAttentionModule, eager, merge_states
from deft_tvm.pytorch import attention as attending
from deft_tvm.pytorch.loaded import FIRST_STAGE, SECOND_STAGE, resolve, spec_of
from deft_tvm.pytorch.ops import arguments
from deft_tvm.pytorch.plan_tensors import PlanTensors
from deft_tvm.tree import Forest
from deft_tvm.workloads import Case, parse, tensors


@pytest.fixture
def attention() -> TreeAttention:
    return TreeAttention(SMALL, artifact(SMALL))


def planned(attention: TreeAttention, workload: str) -> Case:
    case = tensors(parse(workload).forest, SMALL)
    attention.plan(case.forest, case.pages)
    return case


class Layer(nn.Module):
    """Attention between two torch operators, as a model has it."""

    def __init__(self, attention: TreeAttention) -> None:
        super().__init__()
        self.attention = TreeAttentionModule(attention)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.attention(q + 1, (k, v))
        return out * 2, lse


class Seen(TorchDispatchMode):
    """The operators that a mode is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_torch_sees_the_operator_where_it_looks(attention: TreeAttention) -> None:
    case = planned(attention, "speculative")
    expected = attention.run(case.q, case.buffers)
    with Seen() as seen:
        shown = attention.run(case.q, case.buffers)
    assert "deft_tvm::tree_attention" in seen.names
    with torch.profiler.profile() as profiler:
        profiled = attention.run(case.q, case.buffers)
    assert any("tree_attention" in event.key for event in profiler.key_averages())
    for found in (shown, profiled):
        assert all(map(torch.equal, found, expected))


def test_a_plain_run_passes_torch_by_unless_it_does_not_tell(
    attention: TreeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls = planned(attention, "speculative"), []
    operator = attending.TREE_ATTENTION
    monkeypatch.setattr(
        attending, "TREE_ATTENTION", lambda *given: [calls.append(given), operator(*given)][1]
    )
    expected = attention.run(case.q, case.buffers)
    assert not calls
    with torch.inference_mode():
        attention.run(case.q, case.buffers)
    assert not calls
    monkeypatch.setattr(eager, "TELLING", False)
    assert all(map(torch.equal, attention.run(case.q, case.buffers), expected))
    assert len(calls) == 1


@pytest.mark.parametrize("workload", ["few_shot:prompt=90,branches=5,tokens=7", "speculative"])
def test_operators_keep_torchs_rules(attention: TreeAttention, workload: str) -> None:
    case = planned(attention, workload)
    inputs = (case.q, list(case.buffers), *attention.operands)
    torch.library.opcheck(torch.ops.deft_tvm.tree_attention.default, inputs)
    outputs = attention.run(case.q, case.buffers)
    torch.library.opcheck(torch.ops.deft_tvm.tree_attention_out.default, (*inputs, *outputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_graph_break(attention: TreeAttention, backend: str) -> None:
    """Each size is compiled in until it first changes (plan and pages, rows), as is a single row.

    Which arrays of a plan are empty makes no difference. The second case has another plan and other
    pages than the first, however a device cuts them.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    layer = Layer(attention).eval()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for prompt, branches, tokens in (
        (90, 5, 7), (400, 5, 7), (90, 5, 8), (700, 40, 3), (5, 3, 60), (9, 1, 1), (300, 1, 9),
        (30, 2, 1), (2000, 2, 1), (8, 64, 1), (100, 7, 64),
    ):  # fmt: skip
        case = planned(attention, f"few_shot:prompt={prompt},branches={branches},tokens={tokens}")
        with torch.no_grad():
            out, lse = compiled(case.q, *case.buffers)
            expected = layer(case.q, *case.buffers)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert counter.frame_count <= 4


def test_compiled_with_outputs_given(attention: TreeAttention) -> None:
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        attention.run(q, (k, v), out, lse)
        return out + 1

    expected, expected_lse = attention.run(case.q, case.buffers)
    out, lse = torch.empty_like(expected), torch.empty_like(expected_lse)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.q, *case.buffers, out, lse), expected + 1)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_compiled_refuses_a_lost_gradient(attention: TreeAttention) -> None:
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")
    compiled = torch.compile(Layer(attention), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="q requires grad, and there is no backward"):
        compiled(case.q.requires_grad_(), *case.buffers)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_an_output_with_a_gradient_is_refused_compiled_or_not(
    attention: TreeAttention, name: str
) -> None:
    """Compiling asks the operator without data; what runs then does not see the gradient."""
    torch._dynamo.reset()
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")
    given = dict(zip(("out", "lse"), attention.run(case.q, case.buffers), strict=True))
    given[name].requires_grad_()

    def call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        attention.run(q, (k, v), out, lse)
        return out + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        with pytest.raises(Exception, match=f"{name} requires grad, and there is no backward"):
            function(case.q, *case.buffers, **given)
        with torch.no_grad():
            function(case.q, *case.buffers, **given)


class Step(nn.Module):
    """A program that takes the plan as it takes the tensors."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Tensor, layout: Tensor
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.deft_tvm.tree_attention(q, [k, v], plan, layout, self.key)


IN_ANOTHER_PROCESS = """
import sys, torch
import deft_tvm.pytorch
program = torch.export.load(sys.argv[1]).module()
given = torch.load(sys.argv[2])
found = program(*given["inputs"])
assert all(torch.equal(a, b) for a, b in zip(found, given["outputs"]))
assert "tvm" not in sys.modules, "the compiler was imported"
"""


@pytest.mark.parametrize("by_path", [True, False], ids=["by path", "by spec"])
def test_exported_to_a_file_and_run_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_path: bool
) -> None:
    monkeypatch.setenv(env.MODULE_PATH.name, str(artifact(SMALL)))
    attention = TreeAttention(SMALL, artifact(SMALL) if by_path else None)
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")
    plan, layout, key = attention.operands
    assert key.endswith(f"@{artifact(SMALL)}") == by_path and spec_of(key) == SMALL
    sizes = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        Step(key), (case.q, *case.buffers, plan, layout), dynamic_shapes=(*[sizes] * 4, None)
    )
    torch.export.save(exported, tmp_path / "program.pt2")

    other = planned(attention, "few_shot:prompt=300,branches=9,tokens=30")
    given = (other.q, *other.buffers, *attention.operands[:2])
    outputs = attention.run(other.q, other.buffers)
    torch.save({"inputs": given, "outputs": outputs}, tmp_path / "tensors.pt")
    files = [str(tmp_path / name) for name in ("program.pt2", "tensors.pt")]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_model_is_exported_with_its_plan_inside(attention: TreeAttention, tmp_path: Path) -> None:
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")
    inputs = (case.q, *case.buffers)
    expected = Layer(attention)(*inputs)
    torch.export.save(torch.export.export(Layer(attention), inputs), tmp_path / "model.pt2")
    planned(attention, "speculative")
    found = torch.export.load(tmp_path / "model.pt2").module()(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_best_module_is_found_by_spec(
    attention: TreeAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(env.MODULE_PATH.name, str(artifact(SMALL)))
    found = deft_tvm.TreeAttention(SMALL)
    assert found.artifact.directory == artifact(SMALL).resolve()
    case = planned(found, "few_shot:prompt=90,branches=5,tokens=7")
    attention.plan(case.forest, case.pages)
    expected = attention.run(case.q, case.buffers)
    assert torch.equal(found.run(case.q, case.buffers)[0], expected[0])


def test_the_module_has_no_state(attention: TreeAttention) -> None:
    module = TreeAttentionModule(attention)
    assert not module.state_dict() and str(SMALL) in repr(module)


def plan_of(workload: str) -> Plan:
    from deft_tvm.device import DeviceProfile
    from deft_tvm.spec import TileShape

    case = tensors(parse(workload).forest, SMALL)
    tiles = [TileShape(2, 64, "float32"), TileShape(64, 64, "float32")]
    return make_plan(case.forest, case.pages, SMALL, tiles, DeviceProfile.nominal())


@pytest.mark.parametrize("workload", ["few_shot", "speculative", "sequences"])
def test_a_plan_s_tensors_have_all_of_it(workload: str) -> None:
    plan = plan_of(workload)
    whole, layout = PlanTensors.of(plan)[:2]
    *scalars, pages, rows, positions, runs, dests, merged, first, second = layout.tolist()
    assert scalars == [1, plan.max_page + 1, plan.num_partials]
    sizes = {"header": 8, "page_indices": pages, "row_order": rows, "row_positions": positions}
    sizes |= {"runs": 7 * runs, "dests": dests, "merge_rows": merged, "merge_indptr": merged + 1}
    sizes |= {"items": 7 * (first + second)}
    for (name, _), part in zip(sizes.items(), whole.split([*sizes.values()]), strict=True):
        assert part.tolist() == getattr(plan, name).reshape(-1).tolist(), name
    items = {tile: end - begin for tile, begin, end in plan.launches}
    assert (items.get(0, 0), items.get(1, 0)) == (first, second)
    found = PlanTensors.of_tensors(whole, layout, num_tiles=2)
    assert found[2:] == PlanTensors.of(plan)[2:]
    assert (found.rows, found.partials) == (plan.num_rows, plan.num_partials)


def test_one_stage_alone_or_both() -> None:
    attention = deft_tvm.load(artifact(SMALL), grouping="node")
    case = planned(attention, "few_shot:prompt=900,branches=5,tokens=7")
    out, lse = attention.run(case.q, case.buffers)
    step, loaded = (
        PlanTensors.of(attention.last_plan),
        resolve(attention.operands.module, "cpu"),
    )
    again, its_lse = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    given = arguments(loaded, step, case.q, case.buffers, again, its_lse)
    assert len(attention.last_plan.merge_rows) == case.forest.num_rows
    loaded.run(FIRST_STAGE, *given)
    assert again.isnan().all()
    loaded.run(SECOND_STAGE, *given)
    assert torch.equal(again, out) and torch.equal(its_lse, lse)


def test_an_update_is_the_plan_made_afresh(attention: TreeAttention) -> None:
    case = planned(attention, "few_shot:prompt=900,branches=5,tokens=7")
    before = attention.operands
    grown = case.forest.with_lengths(case.forest.lengths + (case.forest.rows > 0))
    attention.update(grown)
    updated = attention.operands
    assert not torch.equal(updated.plan, before.plan)
    attention.plan(grown, case.pages)
    for found, fresh in zip(updated[:2], attention.operands[:2], strict=True):
        assert torch.equal(found, fresh)


def test_what_torch_has_to_see_goes_through_the_operator(attention: TreeAttention) -> None:
    case = planned(attention, "few_shot:prompt=90,branches=5,tokens=7")
    q, (k, v) = case.q, case.buffers
    expected, _ = attention.run(q, (k, v))
    by_operator, _ = torch.ops.deft_tvm.tree_attention(q, [k, v], *attention.operands)
    assert torch.equal(by_operator, expected)
    assert torch.equal(attention.run(torch._neg_view(-q), (k, v))[0], expected)
    functional = torch.func.functionalize(lambda q: attention.run(q, (k, v))[0])
    assert torch.equal(functional(q), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(attention.run(mode.from_tensor(q), (k, v))[0], FakeTensor)
    with torch.profiler.profile() as profile:
        attention.run(q, (k, v))
    assert "deft_tvm::tree_attention" in {event.key for event in profile.key_averages()}


def test_a_derivative_that_would_be_lost_is_refused(attention: TreeAttention) -> None:
    """Also where no tensor that the caller holds says that it requires grad."""
    case = planned(attention, "few_shot:prompt=9,branches=5,tokens=7")

    def summed(q: Tensor) -> Tensor:
        return attention.run(q, case.buffers)[0].sum()

    expected, direction = summed(case.q), torch.ones_like(case.q)
    with pytest.raises(InputError, match="q requires grad, and there is no backward"):
        torch.func.grad(summed)(case.q)
    with pytest.raises(InputError, match="q has a tangent, and there is no derivative"):
        torch.func.jvp(summed, (case.q,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(case.q, direction)
        with pytest.raises(InputError, match="q has a tangent"):
            summed(dual)
        assert torch.equal(summed(dual.detach()), expected)


@st.composite
def states(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    sets, rows = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    outs = torch.randn(sets, rows, 2, 8, generator=random)
    lses = torch.randn(sets, rows, 2, generator=random) * draw(st.sampled_from([1.0, 100.0]))
    lses[torch.rand(lses.shape, generator=random) < draw(st.sampled_from([0.0, 0.5]))] = -torch.inf
    return outs.masked_fill(lses.isinf().unsqueeze(-1), torch.nan), lses


@given(states())
def test_merge_states(given_states: tuple[Tensor, Tensor]) -> None:
    """A set of which a row sees nothing may hold anything, here NaN."""
    outs, lses = given_states
    exact_out, exact_lse = reference.merge_states(outs.nan_to_num(0.0), lses)
    out, lse = merge_states(outs, lses)
    assert out.dtype == lse.dtype == torch.float32
    nothing = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing) and not out[nothing].any()
    # The weights' exponents are off by an ε of LSEs of up to 500, and sums by some more.
    factor = reference.FLOAT32_FACTOR * reference.FLOAT32_ROUNDING
    bound = factor * (1 + float(lses[lses.isfinite()].abs().amax())) if not nothing.all() else 0.0
    largest = float(outs.nan_to_num(0.0).abs().max())
    assert (out - exact_out).abs().max() <= bound * max(1.0, largest)
    assert nothing.all() or (lse - exact_lse)[~nothing].abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merge_states_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    outs = torch.randn(3, 2, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    lses = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 2, 2)
    out, lse = merge_states(outs, lses)
    exact, _ = reference.merge_states(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    # One rounding of the result; before it some eight of exponentials, products and sums.
    compute = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = torch.finfo(dtype).eps / 2 + 8 * compute / 2
    assert (out - exact).abs().max() <= bound * outs.abs().max()


def test_parts_of_a_tree_merge_into_the_whole(attention: TreeAttention) -> None:
    """One prompt attended by all branches, and each branch by itself: two sets of tokens."""
    case = tensors(Forest.from_parents([-1, 0, 0], [40, 5, 6]), SMALL)
    table, sizes = case.pages, case.pages.page_indptr
    parts = [
        (Forest.from_parents([-1, 0, 0], [40, 0, 0]), [0, sizes[1], sizes[1], sizes[1]], 0),
        (Forest.from_parents([-1, -1], [5, 6]), sizes[1:] - sizes[1], sizes[1]),
    ]
    states = []
    for forest, indptr, begin in parts:
        slots = table.first_slot[-forest.num_nodes :].copy()
        slots[forest.lengths == 0] = 0
        attention.plan(forest, table.page_indices[begin:], indptr, slots)
        states.append(attention.run(case.q, case.buffers))
    out, lse = merge_states(*(torch.stack(pair) for pair in zip(*states, strict=True)))
    exact = case.reference()
    assert (out - exact.out).abs().max() <= exact.bound().out
    assert (lse - exact.lse).abs().max() <= exact.bound().lse


def test_public_names_are_lazy() -> None:
    code = (
        "import sys, deft_tvm\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(deft_tvm.__all__) <= set(dir(deft_tvm))\n"
        "assert all(getattr(deft_tvm, name) for name in deft_tvm.__all__)\n"
        "assert deft_tvm.__version__[0].isdigit() and 'tvm' not in sys.modules\n"
        "from deft_tvm import *\n"
        "AttentionSpec.gqa(num_q_heads=2, num_kv_heads=1, head_dim=64)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="module 'deft_tvm' has no attribute 'nothing'"):
        deft_tvm.nothing  # noqa: B018


def test_a_row_that_no_set_sees_has_no_gradient() -> None:
    outs = torch.ones(2, 2, 1, 3)
    lses = torch.tensor([[[0.3], [-torch.inf]], [[1.0], [-torch.inf]]], requires_grad=True)
    out, lse = merge_states(outs, lses)
    (out.sum() + lse[0].sum()).backward()
    assert lses.grad is not None and lses.grad.isfinite().all()
    assert lse[1] == -torch.inf and not out[1].any()
