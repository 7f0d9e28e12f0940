"""Workload strings, the trees they name, recorded files, and the tensors made for them."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deft_tvm.errors import WorkloadError
from deft_tvm.spec import AttentionSpec
from deft_tvm.tree import Forest
from deft_tvm.workloads import FAMILIES, families, load_recorded, notation, parse, tensors
from deft_tvm.workloads.families import draft_choices

SMALL = "gqa:hq=4,hkv=2,d=8,page=4"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_is_spelled_in_full_and_parses_to_itself(family: str) -> None:
    workload = parse(family)
    again = parse(workload.name)
    assert workload.name.startswith(f"{family}:") and again.name == workload.name
    assert again.forest.same_topology(workload.forest)
    assert np.array_equal(again.forest.lengths, workload.forest.lengths)
    assert workload.description.endswith(".")


def test_examples_in_docstrings() -> None:
    for module in (families, notation):
        done = doctest.testmod(module)
        assert done.attempted and not done.failed


def test_arguments_come_in_any_order_and_print_in_one() -> None:
    name = "few_shot:prompt=9,branches=2,tokens=5,vary=1"
    assert parse("few_shot:vary=1,tokens=5,branches=2,prompt=9").name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fewshot", "workload 'fewshot' starts with 'fewshot'; expected one of few_shot, multi"),
        ("long:nodes=3", "has 'nodes=3'; expected each of tokens at most once"),
        ("long:tokens=3,tokens=4", "has 'tokens=4'; expected each of tokens at most once"),
        ("long:tokens=0", "tokens is '0'; expected a whole number from 1 on"),
        ("long:tokens=1e3", "tokens is '1e3'; expected a whole number from 1 on"),
        ("long:tokens", "tokens is ''; expected a whole number from 1 on"),
        ("few_shot:tokens=2,vary=3", "vary is 3; expected at most tokens, which is 2"),
    ],
)
def test_a_string_that_names_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(WorkloadError) as refusal:
        parse(text)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "nodes", "tokens", "rows"),
    [
        ("few_shot", 33, 4000 + 32 * 64, 32),
        ("multi_step", 1 + 2 + 10, 1200 + 12 * 300, 10),
        ("speculative", 64, 1000 + 63, 64),
        ("speculative:nodes=1,batch=3", 3, 3000, 3),
        ("sequences", 16, 16 * 1024, 16),
        ("long", 1, 65536, 1),
    ],
)
def test_sizes_of_the_named_trees(text: str, nodes: int, tokens: int, rows: int) -> None:
    forest = parse(text).forest
    assert (forest.num_nodes, forest.num_tokens, forest.num_rows) == (nodes, tokens, rows)


def test_answers_of_few_shot_vary_within_their_range() -> None:
    lengths = parse("few_shot:branches=50,tokens=20,vary=7").forest.lengths[1:]
    assert lengths.min() == 13 and lengths.max() == 27
    assert (np.diff(lengths) < 0).any() and (np.diff(lengths) > 0).any()


def test_a_beam_search_is_one_tree_with_every_history_of_full_length() -> None:
    forest = parse("beam:prompt=10,beams=6,tokens=30").forest
    ends = (forest.start + forest.lengths)[forest.rows > 0]
    assert ends.tolist() == [40] * 6
    assert (forest.parents < 0).sum() == 1
    assert 40 + 5 <= forest.num_tokens < 10 + 6 * 30


def test_the_forest_family_has_as_many_different_trees_as_asked() -> None:
    forest = parse("forest:trees=8").forest
    roots = np.flatnonzero(forest.parents < 0)
    assert len(roots) == 8 and len(np.unique(forest.lengths[roots])) == 8
    assert parse("forest:trees=11").forest.parents.min() == -1
    assert (parse("forest:trees=11").forest.parents < 0).sum() == 11


def test_draft_choices_hold_every_prefix_before_the_path_and_none_twice() -> None:
    choices = draft_choices(255)
    assert len(set(choices)) == 255
    for place, path in enumerate(choices):
        assert len(path) == 1 or path[:-1] in choices[:place]
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in choices[:place]


def reasoning(**changes: dict[str, object]) -> list[dict[str, object]]:
    """A prompt of 5, branches 1 to 3 from step 1 on; 2 goes on as 7 and 8 after it has ended."""
    nodes: dict[str, dict[str, object]] = {
        "0": {"id": 0, "value": 5, "start": -4, "end": 0, "children": [1, 2, 3]},
        "1": {"id": 1, "value": 2, "start": 1, "end": 2, "children": []},
        "2": {"id": 2, "value": 3, "start": 1, "end": 3, "children": [7, 8]},
        "8": {"id": 8, "value": 1, "start": 4, "end": 4, "children": []},
        "3": {"id": 3, "value": 4, "start": 1, "end": 4, "children": []},
        "7": {"id": 7, "value": 3, "start": 4, "end": 6, "children": []},
    }
    for node, change in changes.items():
        nodes[node.removeprefix("node")] |= change
    return [{"incompleted": True, "data": 0}, {"incompleted": False, "data": nodes}]


def write(folder: Path, content: object) -> Path:
    path = folder / "trees.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def described(forest: Forest) -> tuple[list[int], list[int], list[int]]:
    return forest.parents.tolist(), forest.lengths.tolist(), forest.rows.tolist()


def test_a_recorded_tree_grows_and_is_pruned(tmp_path: Path) -> None:
    (recording,) = load_recorded(write(tmp_path, reasoning()))
    assert recording.steps == 6 and recording.name == "trees.json[1]"
    expected = {
        1: ([-1, 0, 0, 0], [5, 1, 1, 1], [0, 1, 1, 1]),
        3: ([-1, 0, 0], [5, 3, 3], [0, 1, 1]),
        4: ([-1, 0, 0, 1, 1], [5, 3, 4, 1, 1], [0, 0, 1, 1, 1]),
        6: ([-1, 0, 1], [5, 3, 3], [0, 0, 1]),
    }
    assert {step: described(recording.at(step).forest) for step in expected} == expected
    assert recording.at(4).name == "trees.json[1] at step 4"


def test_recorded_drafts_stand_under_a_context_that_grows_by_what_was_accepted(
    tmp_path: Path,
) -> None:
    records = [{"Accept_length": [3, 1, 2], "Avg_accept_length": 2.0}, {"Accept_length": [1]}]
    drafts = {"tree_structure": [[0], [1], [0, 0]], "token_tree_size": 4, "records": records}
    first, second = load_recorded(write(tmp_path, [drafts]), prompt=50)
    assert (first.steps, second.steps) == (3, 1)
    assert [first.at(step).forest.lengths[0] for step in (1, 2, 3)] == [50, 53, 54]
    assert described(first.at(1).forest) == ([-1, 0, 0, 1], [50, 1, 1, 1], [1, 1, 1, 1])


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_that_was_not_recorded_is_refused(tmp_path: Path, step: int) -> None:
    (recording,) = load_recorded(write(tmp_path, reasoning()))
    with pytest.raises(WorkloadError, match=rf"step is {step}; expected 1 to 6"):
        recording.at(step)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is no file of recorded trees: Input data was truncated"),
        ('[{"data": ' + "[" * 100_000, "is no file of recorded trees: maximum recursion depth"),
        ({}, "is no file of recorded trees: Expected `array`, got `object`"),
        ([{}], r"trees.json\[0\] has neither 'data' nor 'tree_structure'"),
        ([{"data": {"0": {"id": 0}}}], "missing required field `value`"),
        (reasoning(node2={"children": [7, 8, 9]}), "node 2 has the child 9; expected a node of"),
        (reasoning(node1={"value": 3}), "node 1 has 3 tokens from step 1 to 2; expected one for"),
        (reasoning(node1={"children": [7]}), "7 steps down from the root for 6 nodes"),
        (reasoning(node7={"children": [0]}), "has 0 nodes that are no node's child, and 6 ids"),
        (reasoning(node8={"id": 7}), "has 1 nodes that are no node's child, and 5 ids for 6"),
        (
            [{"tree_structure": [[0], [1, 0]], "records": []}],
            r"trees.json\[0\]: choices\[1\] is \(1, 0\); expected its prefix \(1,\)",
        ),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        load_recorded(write(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file or directory; expected a JSON file"):
        load_recorded(tmp_path / "none.json")


def test_a_recorded_tree_is_named_by_its_file_and_step(tmp_path: Path) -> None:
    path = write(tmp_path, reasoning())
    workload = parse(f"recorded:step=4,path={path}")
    assert workload.name == f"recorded:path={path},request=1,step=4,prompt=1000"
    assert workload.forest.same_topology(load_recorded(path)[0].at(4).forest)
    again = parse(workload.name)
    assert again.name == workload.name
    assert described(again.forest) == described(workload.forest)


def test_without_a_step_it_is_the_last_of_those_with_the_most_rows(tmp_path: Path) -> None:
    path = write(tmp_path, reasoning())
    assert parse(f"recorded:path={path}").name.endswith("step=4,prompt=1000")  # of 1 to 6
    records = [{"Accept_length": [1]}, {"Accept_length": [3, 1, 2]}]
    path = write(tmp_path, [{"tree_structure": [[0], [1]], "records": records}])
    workload = parse(f"recorded:path={path},request=2,prompt=50")
    assert workload.name.endswith("request=2,step=3,prompt=50")
    assert workload.forest.lengths.tolist() == [54, 1, 1]


def test_the_path_of_a_recorded_tree_may_be_relative_and_have_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name has it absolute: in a log it means the same wherever it is read."""
    folder = tmp_path / "a,b"
    folder.mkdir()
    path = write(folder, reasoning())
    monkeypatch.chdir(folder)
    workload = parse("recorded:path=trees.json,step=1")
    assert workload.name == f"recorded:path={path},request=1,step=1,prompt=1000"
    assert parse(workload.name).name == workload.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "workload 'recorded' has no path; expected recorded:path=FILE"),
        (":step=3", "workload 'recorded:step=3' has no path; expected recorded:path=FILE"),
        (":path={},step=7", "trees.json[1]: step is 7; expected 1 to 6"),
        (":path={},step=last", "step is 'last'; expected a whole number from 1 on"),
        (":path={},request=2", "request is 2; expected one of the file's complete ones, of which"),
        (":path={},nodes=2", "has 'nodes=2'; expected each of path, request, step, prompt at most"),
        (":path={}x", "trees.jsonx: No such file or directory; expected a JSON file"),
    ],
)
def test_a_recorded_tree_that_is_not_there_is_refused(
    tmp_path: Path, arguments: str, message: str
) -> None:
    path = write(tmp_path, reasoning())
    with pytest.raises(WorkloadError) as refusal:
        parse("recorded" + arguments.format(path))
    assert message in str(refusal.value)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_paged_and_contiguous_tensors_hold_the_same_attention(layout: str) -> None:
    forest = parse("forest:trees=4,prompt=9").forest
    spec = AttentionSpec.parse(f"{SMALL},layout={layout}")
    paged, flat = tensors(forest, spec), tensors(forest, spec, contiguous=True)
    paged.pages.check(forest)
    flat.pages.check(forest)
    one, other = paged.reference(), flat.reference()
    assert torch.equal(one.out, other.out) and torch.equal(one.lse, other.lse)
    assert one.out.isfinite().all()


def test_every_slot_without_a_token_is_poisoned() -> None:
    forest = parse("speculative:nodes=9,context=6").forest
    case = tensors(forest, AttentionSpec.parse(SMALL))
    for buffer in case.buffers:
        assert buffer.isfinite().all(-1).all(-1).sum() == forest.num_tokens
        assert buffer.isnan().any()


def test_a_draft_shares_pages_and_a_long_node_begins_one() -> None:
    forest = parse("speculative:nodes=9,context=6,batch=2").forest
    pages = tensors(forest, AttentionSpec.parse(SMALL)).pages
    assert pages.first_slot.tolist() == [0, 2, 3, 0, 1, 2, 3, 0, 1] * 2
    assert len(np.unique(pages.page_indices)) == 2 * 4


def test_a_seed_fixes_the_tensors_and_another_changes_them() -> None:
    forest, spec = parse("few_shot:prompt=9,branches=3,tokens=5").forest, AttentionSpec.parse(SMALL)
    first, again, other = tensors(forest, spec), tensors(forest, spec), tensors(forest, spec, 1)
    assert torch.equal(first.q, again.q) and not torch.equal(first.q, other.q)
    assert np.array_equal(first.pages.page_indices, again.pages.page_indices)
    assert not np.array_equal(first.pages.page_indices, other.pages.page_indices)


def test_the_type_of_tensors_is_the_specs_and_logits_reach_what_was_asked() -> None:
    spec = AttentionSpec.parse("gqa:hq=8,hkv=2,d=64,dtype=bf16")
    case = tensors(parse("few_shot:prompt=2000,branches=4").forest, spec, max_logit=100)
    assert case.q.dtype == case.buffers[0].dtype == torch.bfloat16
    assert 80 < case.reference().max_logit < 125
