"""The order of the rooms: what may import what, and what the repository may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from deft_tvm import env

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deft_tvm"

#: Front to back: a room imports from its own line and those above.
CORRIDOR = (
    ("errors",),
    ("env", "arrays", "files"),
    ("debug",),
    ("dtypes",),
    ("spec_checks",),
    ("spec", "notation", "models", "device", "preorder", "prefixes", "tree", "pages", "context"),
    ("pool",),
    ("plan",),
    ("kernels",),
    ("schedules",),
    ("tuning.lines",),
    ("tuning.log", "tuning.defaults"),
    ("manifest", "finding", "threads", "native"),
    ("build",),
    ("artifact",),
    ("fp8", "layer"),
    ("pytorch",),
    ("decoding",),
    ("integrations",),
)
COMPILER = {"kernels", "schedules", "tuning.defaults", "native", "build"}
#: May import any room, and no room imports them.
OUTSIDE = {"__init__", "tuning", "workloads", "timing", "limit", "show", "reference"} | {
    *("check", "peers", "bench", "compare", "figures", "cli", "commands", "demo", "wheel"),
    *("gpu_check", "exit_codes", "interruption"),
}
#: Inside a function only, for one reason each.
CROSSINGS = {
    ("artifact", "build"): "where there is no module, the default is built",
    ("pytorch", "check"): "DEFT_TVM_CHECK",
    ("pytorch", "workloads"): "DEFT_TVM_CHECK",
    ("pytorch", "reference"): "DEFT_TVM_CHECK",
}
RUN_TIME_PACKAGES = {"torch", "numpy", "tvm_ffi", "msgspec", "platformdirs", "filelock"}
#: What a room may import besides.
OTHER_PACKAGES = {"integrations": {"transformers"}}

ORDER = {room: place for place, line in enumerate(CORRIDOR) for room in line}
RUN_TIME = ORDER.keys() - COMPILER
MOST_LINES = 500
MOST_BYTES = 2 << 20


@dataclass(frozen=True)
class Import:
    """One import of a file: the module's full name, and whether a function body makes it."""

    name: str
    lazy: bool


def _room(module: str) -> str:
    """``plan.layout`` → ``plan``; of `tuning` only the leaves belong to the corridor."""
    parts = module.split(".")
    leaf = ".".join(parts[:2])
    return leaf if leaf in ORDER else parts[0]


def _module(file: Path) -> str:
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", lazy) for alias in child.names)
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(child, lazy or inside)


def _ours(found: Import) -> str | None:
    """The room that is imported; None where it is no module of this package."""
    package, _, rest = found.name.partition(".")
    return _room(rest) if package == "deft_tvm" and rest else None


MODULES = {_module(file): file for file in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {
    name: list(_imports(ast.parse(file.read_text(encoding="utf-8"))))
    for name, file in MODULES.items()
}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_in_a_room(module: str) -> None:
    assert _room(module) in ORDER.keys() | OUTSIDE


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m) in ORDER])
def test_rooms_import_only_what_lies_before_them(module: str) -> None:
    room = _room(module)
    for found in IMPORTS[module]:
        imported = _ours(found)
        if imported is None or (found.lazy and (room, imported) in CROSSINGS):
            continue
        assert imported in ORDER, f"{module} imports {imported}, which is outside the corridor"
        assert ORDER[imported] <= ORDER[room], f"{module} imports {imported}, which comes later"
        compiler = room in RUN_TIME and imported in COMPILER
        assert not compiler, f"{module} runs without a compiler and imports {imported}"


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m) in RUN_TIME] + ["tuning"])
def test_run_time_half_imports_few_packages(module: str) -> None:
    eager = {found.name.partition(".")[0] for found in IMPORTS[module] if not found.lazy}
    foreign = eager - sys.stdlib_module_names - {"deft_tvm"}
    assert foreign <= RUN_TIME_PACKAGES | OTHER_PACKAGES.get(_room(module), set())


def test_run_time_half_works_where_nothing_else_is_installed() -> None:
    program = """
import sys
for name in ("tvm", "scipy", "xgboost", "psutil", "cloudpickle", "typer", "rich", "matplotlib"):
    sys.modules[name] = None
import deft_tvm, deft_tvm.artifact, deft_tvm.plan, deft_tvm.pytorch
spec = deft_tvm.AttentionSpec.gqa(num_q_heads=3, num_kv_heads=3, head_dim=72)
try:
    deft_tvm.TreeAttention(spec, None)
except deft_tvm.errors.CompilerMissing as error:
    print(error)
"""
    command = (sys.executable, "-c", program)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "pip install '.[tune]'" in done.stdout


def test_the_oracle_imports_torch_alone() -> None:
    names = {found.name.partition(".")[0] for found in IMPORTS["reference"]}
    assert names - sys.stdlib_module_names == {"torch"}


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, deft_tvm; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run((sys.executable, "-c", program), cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("folder", ["deft_tvm", "tests", "benchmarks"])
def test_files_are_short(folder: str) -> None:
    files = (ROOT / folder).rglob("*.py")
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert [str(file) for file, count in lines.items() if count > MOST_LINES] == []


def test_no_file_is_large() -> None:
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        pytest.skip("not a git repository")
    files = [ROOT / name for name in done.stdout.split("\0") if name]
    assert [f for f in files if f.is_file() and f.stat().st_size > MOST_BYTES] == []


def test_environment_variables_are_those_that_contributing_lists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(DEFT_TVM_\w+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert listed == [(v.name, v.meaning, v.expected) for v in env.VARIABLES]


def test_no_other_environment_variable_is_spoken_of() -> None:
    known = {variable.name for variable in env.VARIABLES}
    for file in [*MODULES.values(), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        assert (
            set(re.findall(r"DEFT_TVM_[A-Z_]*[A-Z]", file.read_text(encoding="utf-8"))) <= known
        ), file


NAMED = re.compile(r"(?<!`)`(?:\w+\.)*?(\w+)\.(\w+)`(?!`)")
"""What a docstring or comment names with a dot: a module's or a class's."""


def test_names_in_docstrings_are_there() -> None:
    texts: dict[str, str] = {}
    for file in MODULES.values():
        text = file.read_text(encoding="utf-8")
        classes = re.findall(r"^class (\w+)", text, re.MULTILINE)
        for name in (file.parent.name if file.stem == "__init__" else file.stem, *classes):
            texts[name] = texts.get(name, "") + text
    named = [
        (file.name, *found)
        for file in MODULES.values()
        for found in NAMED.findall(file.read_text(encoding="utf-8"))
    ]
    assert len(named) > 100
    wrong = [
        (file, f"{owner}.{name}")
        for file, owner, name in named
        if owner in texts and name not in texts and not re.search(rf"\b{name}\b", texts[owner])
    ]
    assert wrong == []
