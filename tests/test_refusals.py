"""What is refused on the way from a tree to its attention, by the sentence that the user reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from built import SMALL, artifact
from torch import Tensor
from torch._subclasses import FakeTensorMode

import deft_tvm
from deft_tvm.errors import (
    ArtifactError,
    DeftError,
    InputError,
    LogError,
    PageError,
    PlanError,
    SpecError,
    TreeError,
)
from deft_tvm.pages import PageTable
from deft_tvm.pytorch import TreeAttention, merge_states
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.tuning.log import TRIALS, TuningLog
from deft_tvm.workloads import Case, tensors

FOREST = Forest.from_parents([-1, 0, 0], [9, 3, 2])


@pytest.fixture(scope="module")
def module() -> TreeAttention:
    return TreeAttention(SMALL, artifact(SMALL))


@pytest.fixture
def attention(module: TreeAttention) -> TreeAttention:
    module.plan(FOREST, case().pages)
    return module


def case() -> Case:
    return tensors(FOREST, SMALL)


def refused(error: type[DeftError], sentence: str) -> Any:
    return pytest.raises(error, match=re.escape(sentence))


INPUTS: dict[str, tuple[str, Callable[[Tensor], Any], str]] = {
    "q dtype": ("q", Tensor.half, "q has dtype float16; expected float32"),
    "q rows": ("q", lambda q: q[:1], "q has shape [1, 4, 16]; expected [2, 4, 16]"),
    "q heads": ("q", lambda q: q[:, :3], "q has shape [2, 3, 16]; expected [2, 4, 16]"),
    "q dimensions": ("q", lambda q: q[0], "q has shape [4, 16]; expected [2, 4, 16]"),
    "q stride": (
        "q",
        lambda q: torch.zeros(2, 16, 4).transpose(1, 2),
        "q has strides (64, 1, 4); expected 1 as the last",
    ),
    "q device": ("q", lambda q: q.to("meta"), "is on meta; expected cpu, where the plan is"),
    "q gradient": (
        "q",
        lambda q: q.requires_grad_(),
        "q requires grad, and there is no backward; expected torch.no_grad(), "
        "torch.inference_mode() or q.detach()",
    ),
    "q type": ("q", Tensor.tolist, "q is list; expected a torch.Tensor"),
    "k dtype": ("k", Tensor.bfloat16, "kv[0] (k) has dtype bfloat16; expected float32"),
    "v page size": (
        "v",
        lambda v: torch.zeros(9, 8, 2, 16),
        "kv[1] (v) has shape [9, 8, 2, 16]; expected [pages, 4, 2, 16]",
    ),
    "v layout": (
        "v",
        lambda v: v.transpose(1, 2),
        "kv[1] (v) has shape [7, 2, 4, 16]; expected [pages, 4, 2, 16]",
    ),
    "q sparse": ("q", Tensor.to_sparse, "q is sparse_coo; expected a dense tensor"),
    "v sparse": ("v", Tensor.to_sparse, "kv[1] is sparse_coo; expected a dense tensor"),
    "q nested": (
        "q",
        lambda q: torch.nested.nested_tensor(list(q)),
        "q is nested; expected a dense tensor",
    ),
    "out sparse": ("out", Tensor.to_sparse, "out is sparse_coo; expected a dense tensor"),
    "lse sparse": ("lse", Tensor.to_sparse, "lse is sparse_coo; expected a dense tensor"),
    "out type": ("out", Tensor.numpy, "out is ndarray; expected a torch.Tensor"),
    "lse type": ("lse", Tensor.tolist, "lse is list; expected a torch.Tensor"),
    "v missing": ("v", lambda v: None, "kv[1] is NoneType; expected a torch.Tensor"),
    "v without pages": (
        "v",
        lambda v: v.flatten(0, 1),
        "kv[1] (v) has shape [28, 2, 16]; expected [pages, 4, 2, 16]",
    ),
    "k stride": (
        "k",
        lambda k: torch.zeros(8, 4, 2, 32)[..., ::2],
        "kv[0] (k) has strides (256, 64, 32, 2); expected 1 as the last",
    ),
    "k device": ("k", lambda k: k.to("meta"), "is on meta; expected cpu, where the plan is"),
    "v gradient": ("v", lambda v: v.requires_grad_(), "kv[1] requires grad"),
    "v type": ("v", Tensor.numpy, "kv[1] is ndarray; expected a torch.Tensor"),
    "out dtype": ("out", Tensor.half, "out has dtype float16; expected float32"),
    "out shape": ("out", lambda out: out[:1], "out has shape [1, 4, 16]; expected [2, 4, 16]"),
    "out stride": (
        "out",
        lambda out: torch.zeros(2, 4, 32)[..., :16],
        "out has strides (128, 32, 1); expected it contiguous",
    ),
    "out gradient": ("out", Tensor.requires_grad_, "out requires grad, and there is no backward"),
    "lse dtype": ("lse", Tensor.double, "lse has dtype float64; expected float32"),
    "lse shape": ("lse", lambda lse: lse[:, 1:], "lse has shape [2, 3]; expected [2, 4]"),
    "lse gradient": ("lse", Tensor.requires_grad_, "lse requires grad, and there is no backward"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", INPUTS)
def test_a_tensor_that_does_not_fit(attention: TreeAttention, name: str) -> None:
    key, change, sentence = INPUTS[name]
    q, (k, v) = case().q, case().buffers
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "out": torch.empty(2, 4, 16)}
    given["lse"] = torch.empty(2, 4)
    given[key] = change(given[key])
    with refused(InputError, sentence):
        attention.run(given["q"], (given["k"], given["v"]), given["out"], given["lse"])


def test_an_output_alone_that_has_no_strides(attention: TreeAttention) -> None:
    with refused(InputError, "lse is sparse_coo; expected a dense tensor"):
        attention.run(case().q, case().buffers, lse=torch.empty(2, 4).to_sparse())


@pytest.mark.parametrize("name", [name for name in INPUTS if name.startswith(("out ", "lse "))])
def test_an_output_that_does_not_fit_beside_a_cache_without_pages(
    module: TreeAttention, name: str
) -> None:
    """Whose tensors are looked at elsewhere than those in pages."""
    key, change, sentence = INPUTS[name]
    contiguous = tensors(FOREST, SMALL, contiguous=True)
    module.plan(FOREST)
    given = {"out": torch.empty(2, 4, 16), "lse": torch.empty(2, 4)}
    given[key] = change(given[key])
    with refused(InputError, sentence):
        module.run(contiguous.q, contiguous.buffers, **given)


@pytest.mark.parametrize("place", range(5))
def test_an_operator_without_data_takes_no_tensor_of_another_device(
    attention: TreeAttention, place: int
) -> None:
    """As compiling asks it."""
    given = [case().q, *case().buffers, torch.empty(2, 4, 16), torch.empty(2, 4)]
    given[place] = given[place].to("meta")
    with FakeTensorMode() as mode:
        plan, layout, key = attention.operands
        fake = [mode.from_tensor(tensor) for tensor in given]
        (q, *kv), outputs = fake[:3], fake[3:]
        operands = (mode.from_tensor(plan), mode.from_tensor(layout), key)
        sentence = f"a tensor {list(given[place].shape)} is on meta; expected cpu, where the plan"
        with refused(InputError, sentence):
            torch.ops.deft_tvm.tree_attention_out(q, kv, *operands, *outputs)
        if place < 3:
            with refused(InputError, sentence):
                torch.ops.deft_tvm.tree_attention(q, kv, *operands)


def test_no_gradient_is_asked_for_under_no_grad(attention: TreeAttention) -> None:
    q = case().q.requires_grad_()
    with torch.no_grad():
        attention.run(q, case().buffers)
    with torch.inference_mode():
        attention.run(q, case().buffers)


def test_kv_that_is_no_tuple_of_the_buffers(attention: TreeAttention) -> None:
    k, v = case().buffers
    with refused(InputError, "kv has 1 tensors; expected 2: k, v"):
        attention.run(case().q, (k,))
    with refused(InputError, "kv has 3 tensors; expected 2: k, v"):
        attention.run(case().q, (k, v, v))
    with refused(InputError, "kv has 3 tensors; expected 2: k, v"):
        torch.ops.deft_tvm.tree_attention(case().q, [k, v, v], *attention.operands)
    with refused(InputError, "kv is one tensor; expected a tuple of tensors, such as kv.unbind()"):
        attention.run(case().q, torch.stack([k, v]))  # type: ignore[arg-type]


def test_a_page_out_of_range(module: TreeAttention) -> None:
    module.plan(FOREST, [0, 1, 7, 2, 3], [0, 3, 4, 5])
    sentence = "page 7 of page_indices is out of range: kv[0] (k) has 7 pages; expected 8 or more"
    with refused(InputError, sentence):
        module.run(case().q, tuple(buffer[:7] for buffer in case().buffers))
    with refused(InputError, sentence):
        cache = [buffer[:7] for buffer in case().buffers]
        torch.ops.deft_tvm.tree_attention(case().q, cache, *module.operands)


def test_a_cache_without_pages_that_is_too_short(module: TreeAttention) -> None:
    contiguous = tensors(FOREST, SMALL, contiguous=True)
    module.plan(FOREST)
    k, v = contiguous.buffers
    with refused(InputError, "kv[1] (v) has 13 tokens; expected 14 or more"):
        module.run(contiguous.q, (k, v[:13]))
    with refused(InputError, "kv[0] (k) has shape [7, 4, 2, 16]; expected [tokens, 2, 16]"):
        module.run(case().q, case().buffers)


def test_the_wrong_order_of_calls() -> None:
    fresh = TreeAttention(SMALL, artifact(SMALL))
    for call, name in (
        (lambda: fresh.run(case().q, case().buffers), "run"),
        (lambda: fresh.update([1, 1, 1]), "update"),
        (lambda: fresh.traffic, "traffic"),
        (lambda: fresh.operands, "operands"),
    ):
        with refused(PlanError, f"{name} came before plan; expected a plan first"):
            call()


def test_an_update_with_another_tree(attention: TreeAttention) -> None:
    with refused(PlanError, "expected other lengths or pages alone, else a new plan"):
        attention.update(Forest.from_parents([-1, 0, 1], [9, 3, 2]))
    with refused(TreeError, "lengths has 2 entries; expected 3"):
        attention.update([1, 2])


def test_a_plan_for_other_tiles(attention: TreeAttention) -> None:
    other_spec = AttentionSpec.gqa(num_q_heads=6, num_kv_heads=2, head_dim=16, page_size=4)
    other = TreeAttention(other_spec, artifact(other_spec))
    assert attention.last_plan is not None
    with refused(PlanError, "expected those of the module"):
        other.use(attention.last_plan)


@pytest.mark.parametrize(("parents", "lengths", "rows", "sentence"), [
    ([1, 2, 0], [1, 1, 1], None, "cycle"),
    ([0], [1], None, "cycle"),
    ([-1, 5], [1, 1], None, "parents[1] is 5"),
    ([-1, 0], [4, -1], None, "lengths[1] is -1; expected 0 or more"),
    ([-1, 0], [4], None, "lengths has 1 entries; expected 2"),
    ([-1], [2], [3], "rows[0] is 3; expected at most lengths[0], which is 2"),
])  # fmt: skip
def test_what_is_no_forest(
    parents: list[int], lengths: list[int], rows: list[int] | None, sentence: str
) -> None:
    with refused(TreeError, sentence):
        Forest.from_parents(parents, lengths, rows)


@pytest.mark.parametrize(("indices", "indptr", "slots", "sentence"), [
    ([0, 1, 2, 2, 3], [0, 3, 4, 5], None, "page 2 is shared by nodes 0 and 1 in overlapping slots"),
    ([0, 1, 2, 3], [0, 2, 3, 4], None, "node 0 has 9 tokens from slot 0 on; expected no more than"),
    ([0, 1, -2, 3, 4], [0, 3, 4, 5], None, "page_indices[2] is -2; expected 0 or more"),
    ([0, 1, 2, 3, 4], [0, 3, 2, 5], None, "page_indptr[2] is 2, after 3; expected it not to fall"),
    ([0, 1, 2, 3, 4], [0, 3, 4], None, "page_indptr has 3 entries; expected one more than"),
    ([0, 1, 2, 3, 4], [0, 3, 4, 5], [0, 4, 0], "first_slot[1] is 4; expected 0 or more and less"),
])  # fmt: skip
def test_pages_that_do_not_hold_the_forest(
    module: TreeAttention,
    indices: list[int],
    indptr: list[int],
    slots: list[int] | None,
    sentence: str,
) -> None:
    with refused(PageError, sentence):
        module.plan(FOREST, indices, indptr, slots)


def test_half_a_page_table(attention: TreeAttention) -> None:
    with refused(InputError, "page_indptr is None; expected where in page_indices each node begin"):
        attention.plan(FOREST, [0, 1, 2])
    with refused(InputError, "page_indices is None beside page_indptr or first_slot"):
        attention.plan(FOREST, None, [0, 1, 2, 3])
    with refused(InputError, "page_indices is None beside page_indptr or first_slot"):
        attention.update(None, first_slot=[0, 0, 0])
    with refused(PlanError, "pages have page_size 8; expected the spec's, which is 4"):
        attention.plan(FOREST, PageTable([0, 1, 2, 3], [0, 2, 3, 4], page_size=8))


def test_a_grouping_that_does_not_exist() -> None:
    with refused(PlanError, "grouping is 'clever'; expected one of node, node_chunk"):
        TreeAttention(SMALL, artifact(SMALL), grouping="clever")


def test_specs_that_are_no_attention() -> None:
    with refused(SpecError, "num_q_heads is 5; expected a multiple of num_kv_heads, which is 2"):
        AttentionSpec.gqa(num_q_heads=5, num_kv_heads=2, head_dim=64)
    with refused(SpecError, "page_size is 12; expected a power of two"):
        AttentionSpec.gqa(num_q_heads=4, num_kv_heads=2, head_dim=64, page_size=12)


def copied(tmp_path: Any, change: Callable[[bytes], bytes], name: str) -> Any:
    source = artifact(SMALL)
    for file in source.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(change(content) if file.name == name else content)
    return tmp_path


@pytest.mark.parametrize(("name", "change", "sentence"), [
    ("module.so", lambda so: so[: len(so) // 2], "the file is damaged or truncated"),
    ("manifest.json", lambda text: text[:-40], "cannot be read"),
    ("manifest.json", lambda text: text.replace(b'"schema": 1', b'"schema": 9'), "update deft_tvm"),
    ("manifest.json", lambda text: text.replace(b'"kernel_abi": ', b'"kernel_abi": 9'), "build"),
    ("manifest.json", lambda text: text.replace(b'"kind": "cpu"', b'"kind": "cuda-cubin"'),
     "expected a module for cpu"),
])  # fmt: skip
def test_modules_that_are_damaged_or_from_elsewhere(
    tmp_path: Any, name: str, change: Callable[[bytes], bytes], sentence: str
) -> None:
    with refused(ArtifactError, sentence):
        deft_tvm.load(copied(tmp_path, change, name), device="cpu")


def test_a_module_for_another_spec() -> None:
    other = AttentionSpec.gqa(num_q_heads=8, num_kv_heads=2, head_dim=16, page_size=4)
    with refused(ArtifactError, f"expected {other}"):
        TreeAttention(other, artifact(SMALL))
    with refused(ArtifactError, f"expected {other}"):
        TreeAttention(other, deft_tvm.load(artifact(SMALL)).artifact)


def test_a_plan_for_a_module_that_was_replaced_by_one_with_other_tiles(
    attention: TreeAttention,
) -> None:
    """As an exported program meets it in a process where the module was built again."""
    plan, layout, key = attention.operands
    with refused(ArtifactError, "expected r999t64f32, for which the plan was made"):
        spec, _, rest = key.partition("#")
        other = f"{spec}#r999t64f32@{rest.partition('@')[2]}"
        torch.ops.deft_tvm.tree_attention(case().q, list(case().buffers), plan, layout, other)


def test_logs_from_another_version_and_logs_cut_off(tmp_path: Any) -> None:
    (tmp_path / TRIALS).write_text('{"schema": 99, "trial": 1}\n')
    with refused(LogError, "schema is 99; expected"):
        TuningLog(tmp_path).read()
    (tmp_path / TRIALS).write_text('{"schema": 1, "tri')
    assert TuningLog(tmp_path).read().skipped == 1


@pytest.mark.parametrize(("outs", "lses", "sentence"), [
    (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3), "lses has shape [2, 3]; expected [2, 3, 4]"),
    (torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 4), "outs has shape [0, 3, 4, 5]; expected [P, R"),
    (torch.zeros(2, 1, 1, 1).int(), torch.zeros(2, 1, 1), "outs has dtype torch.int32; expected a"),
    (torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1).int(), "lses has dtype torch.int32; expected a"),
    (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 1), "lses has shape [2, 3, 1]; expected [2, 3, 4]"),
    (torch.zeros(2), torch.zeros(()), "outs has shape [2]; expected [P, R, H, V] with one set"),
])  # fmt: skip
def test_states_that_do_not_fit(outs: Tensor, lses: Tensor, sentence: str) -> None:
    with refused(InputError, sentence):
        merge_states(outs, lses)


SPECS: dict[str, tuple[Callable[[], AttentionSpec], str]] = {
    "heads": (lambda: gqa(num_q_heads=4.0), "num_q_heads is 4.0; expected an integer"),
    "width": (lambda: gqa(head_dim=16.5), "buffers[0].width is 16.5; expected an integer"),
    "window": (lambda: gqa(window=7.5), "window is 7.5; expected an integer"),
    "scale": (lambda: gqa(scale="half"), "scale is 'half'; expected a number"),
    "rope": (
        lambda: AttentionSpec.mla(num_q_heads=4, kv_lora_rank=32, qk_rope_head_dim=-8, scale=0.1),
        "buffers[1] (rope) has width -8; expected 1 or more",
    ),
    "nope": (
        lambda: AttentionSpec.mla(
            num_q_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=-8
        ),
        "the nope width is -8 beside a rope of 8; expected 1 or more together",
    ),
    "buffer": (
        lambda: replace(gqa(), buffers=(replace(gqa().buffers[0], name="../k"),) * 2),
        "buffers[0] is named '../k'; expected letters, digits or _",
    ),
}


def gqa(**changed: Any) -> AttentionSpec:
    return AttentionSpec.gqa(**({"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16} | changed))


@pytest.mark.parametrize("name", SPECS)
def test_no_attention(name: str) -> None:
    make, sentence = SPECS[name]
    with refused(SpecError, sentence):
        make()


def test_specs_that_are_equal_are_spelled_alike() -> None:
    for one, other in ((1, 1.0), (np.float64(0.3), 0.3)):
        assert str(gqa(scale=one)) == str(gqa(scale=other)), one
        assert str(gqa(soft_cap=one)) == str(gqa(soft_cap=other)), one


def test_text_is_no_attention() -> None:
    with refused(InputError, f"spec is {str(SMALL)!r}; expected an AttentionSpec"):
        TreeAttention(str(SMALL))


def test_what_is_no_forest_plan_or_device() -> None:
    attention = TreeAttention(SMALL, artifact(SMALL))
    with refused(InputError, "forest is None; expected a deft_tvm.Forest"):
        attention.plan(None)
    with refused(InputError, "forest is list; expected a deft_tvm.Forest"):
        attention.plan([-1, 0])
    with refused(InputError, "plan is None; expected a deft_tvm.Plan"):
        attention.use(None)
    for device in ("meta", "mps", "abc", 3.5):
        with refused(InputError, f"device is {device!r}; expected cpu or cuda"):
            TreeAttention(SMALL, artifact(SMALL), device)


def test_a_page_table_beside_its_parts_and_kv_that_is_none() -> None:
    attention, forest = TreeAttention(SMALL, artifact(SMALL)), Forest.from_parents([-1], [3])
    with refused(InputError, "page_indptr or first_slot is given beside a PageTable; expected nei"):
        attention.plan(forest, PageTable([0], [0, 1], page_size=4), [0, 1])
    attention.plan(forest, [0], [0, 1])
    with refused(InputError, "kv is NoneType; expected a tuple of tensors"):
        attention.run(torch.zeros(1, 4, 16), None)
