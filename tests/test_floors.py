"""The shape of the tree: imports go down its floors, and what keeps it readable stays out of it or in bounds.

Each rule is a function from a parsed module to its violations. It is run on every module of the project, and
on a few lines that break it, so that no rule can be green because it sees nothing.

    floor   0 kernels   1 config   2 data   3 parallel   4 model   5 training, checkpoint   6 evaluation
            7 train.py, evaluate.py   8 tools, benchmarks
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "__init__": 0,  # of megatron_iml itself: imports nothing
    "command": 0,
    "kernels": 0,
    "config": 1,
    "data": 2,
    "parallel": 3,
    "model": 4,
    "training": 5,
    "checkpoint": 5,
    "evaluation": 6,
    "train": 7,
    "evaluate": 7,
    "generate": 7,
    "launch": 7,
    "tools": 8,
    "benchmarks": 8,
}
MEGATRON_CORE_FLOORS = {"parallel", "model", "training", "checkpoint"}
KERNEL_READERS = {"kernels", "model", "benchmarks"}
KERNEL_LIBRARIES = {"torch", "triton"}
WITHOUT_TORCH = {"config", "data"}
HOPS_OF_DATA = {
    "taxonomy": 1,
    "sources": 2,
    "bench": 3,
    "contamination": 4,
    "corpus": 4,
    "plan": 5,
    "rows": 6,
}
"""The way of the data; what all hops share, directly in data/, is at 0."""


@dataclass(frozen=True)
class Module:
    """A parsed file; `path` is relative to the project's root."""

    path: Path
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def place(self) -> str:
        """The key of FLOORS that the file belongs to."""
        parts = self.path.parts
        return Path(parts[1]).stem if parts[0] == "megatron_iml" else parts[0]

    @property
    def name(self) -> str:
        """Import name; kernels/ is imported as megatron_iml.kernels only."""
        parts = self.path.with_suffix("").parts
        parts = ("megatron_iml", *parts) if parts[0] == "kernels" else parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[Module]:
    """Every Python file of the project but its tests; the link megatron_iml/kernels is not followed."""
    tops = ("megatron_iml", "kernels", "tools", "benchmarks")
    files = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    return [Module(path.relative_to(ROOT), path.read_text()) for path in files]


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the file, functions included."""
    package = module.name.split(".") if module.path.stem == "__init__" else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_go_down(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if within(name, "megatron_iml") and name.count(".") >= 1:
            target = name.split(".")[1]
            if FLOORS[target] > FLOORS[module.place]:
                yield f"{line}: floor {FLOORS[module.place]} imports {name} of floor {FLOORS[target]}"


def megatron_core_has_its_floors(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if within(name, "megatron.core") and module.place not in MEGATRON_CORE_FLOORS:
            yield f"{line}: {name}"


def parallel_state_has_one_reader(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if "parallel_state" in name.split(".") and module.place != "parallel":
            yield f"{line}: {name}"


def kernels_have_their_readers(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if within(name, "megatron_iml.kernels") and module.place not in KERNEL_READERS:
            yield f"{line}: {name}"


def kernels_know_nothing_else(module: Module) -> Iterator[str]:
    allowed = KERNEL_LIBRARIES | sys.stdlib_module_names
    for line, name in imports(module):
        if (
            module.place == "kernels"
            and not within(name, "megatron_iml.kernels")
            and name.split(".")[0] not in allowed
        ):
            yield f"{line}: {name}"


def torch_stays_out(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if module.place in WITHOUT_TORCH and name.split(".")[0] in {"torch", "megatron", "triton"}:
            yield f"{line}: {name}"


def hop_of_data(name: str) -> int:
    """Where a module below megatron_iml.data stands on the way of the data."""
    return HOPS_OF_DATA.get(name.split(".")[2], 0)


def data_flows_one_way(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if module.place == "data" and name.startswith("megatron_iml.data."):
            # data/__init__.py has no hop of its own and imports nothing.
            here, there = hop_of_data(module.name), hop_of_data(name)
            if there > here or (there == here > 0 and name.split(".")[2] != module.name.split(".")[2]):
                yield f"{line}: hop {here} imports {name} of hop {there}"


def no_grab_bags(module: Module) -> Iterator[str]:
    if module.path.stem in {"utils", "util", "misc", "common"}:
        yield f"1: {module.path.name} says nothing of what is in it"


def files_are_short(module: Module) -> Iterator[str]:
    length = module.source.count("\n")
    if length >= 400:
        yield f"1: {length} lines; allowed: under 400"


def functions_are_short(module: Module) -> Iterator[str]:
    limit = 150 if module.place == "kernels" else 60
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length >= limit:
                yield f"{node.lineno}: {node.name} has {length} lines; allowed: under {limit}"


def modules_say_what_they_are(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield "1: no docstring"


def no_global(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"


def no_getattr_with_a_default(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
            yield f"{node.lineno}: {ast.unparse(node)}"


def no_broad_except(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in {"Exception", "BaseException"} for kind in kinds):
                yield f"{node.lineno}: except {ast.unparse(node.type) if node.type else ''}"


def asserts_have_messages(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            yield f"{node.lineno}: {ast.unparse(node)}"


RULES: dict[Callable[[Module], Iterator[str]], tuple[str, str]] = {
    imports_go_down: ("megatron_iml/data/x.py", "def f():\n    from megatron_iml.model import opt\n"),
    megatron_core_has_its_floors: ("megatron_iml/evaluation/x.py", "from megatron.core import mpu\n"),
    parallel_state_has_one_reader: ("megatron_iml/model/x.py", "from megatron.core import parallel_state\n"),
    kernels_have_their_readers: ("megatron_iml/training/x.py", "from megatron_iml.kernels import philox\n"),
    kernels_know_nothing_else: ("kernels/op/x.py", "from ...config import Config\n"),
    torch_stays_out: ("megatron_iml/data/x.py", "def f():\n    import torch.nn\n"),
    data_flows_one_way: ("megatron_iml/data/bench/x.py", "from megatron_iml.data.corpus import format\n"),
    no_grab_bags: ("megatron_iml/data/utils.py", ""),
    files_are_short: ("megatron_iml/data/x.py", "\n" * 400),
    functions_are_short: ("tools/x.py", "def f():\n" + "    f()\n" * 59),
    modules_say_what_they_are: ("tools/x.py", "import os\n"),
    no_global: ("tools/x.py", "def f():\n    global a\n"),
    no_getattr_with_a_default: ("tools/x.py", "getattr(config, 'steps', 1)\n"),
    no_broad_except: ("tools/x.py", "try:\n    f()\nexcept (ValueError, Exception):\n    pass\n"),
    asserts_have_messages: ("tools/x.py", "assert a == b\n"),
}
"""Rule -> a file name and lines that break it."""


def rule_name(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_the_tree_obeys(rule: Callable[[Module], Iterator[str]]) -> None:
    violations = [f"{module.path}:{violation}" for module in modules() for violation in rule(module)]
    assert not violations, "\n".join([rule.__name__, *violations])


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_rule_sees_what_breaks_it(rule: Callable[[Module], Iterator[str]]) -> None:
    path, source = RULES[rule]
    assert len(list(rule(Module(Path(path), source)))) == 1


def test_no_import_cycles() -> None:
    known = {module.name for module in modules()}
    graph = {}
    for module in modules():
        # `from package import name` may mean the module package.name or a name in package.
        named = {name if name in known else name.rpartition(".")[0] for _, name in imports(module)}
        # A package's __init__ gathers its modules; their way back to it is no design cycle.
        graph[module.name] = {name for name in named & known if not within(module.name, name)}
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_data_imports_without_the_engine() -> None:
    names = [module.name for module in modules() if module.place in WITHOUT_TORCH]
    heavy = "{'torch', 'megatron', 'triton'} & set(sys.modules)"
    program = f"import sys, {', '.join(names)}; print(*sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
