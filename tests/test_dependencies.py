"""Every dependency has a reason in CONTRIBUTING.md and a tested version in the constraints."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def required() -> set[tuple[str, str]]:
    """(package, extra) of everything that setup.py asks for; an empty extra is always installed."""
    (call,) = (
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    groups = {"": ast.literal_eval(arguments["install_requires"])} | ast.literal_eval(
        arguments["extras_require"]
    )
    return {(re.split(r"[<>=]", line)[0], extra) for extra, lines in groups.items() for line in lines}


def normal(name: str) -> str:
    """A package's name as an index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def test_every_dependency_has_a_reason() -> None:
    rows = re.findall(
        r"^\| ([\w-]+) \| (?:`(\w+)`)? ?\| \S.* \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert set(rows) == required()


def test_every_dependency_is_pinned() -> None:
    assert {normal(name) for name, _ in required()} <= set(pins("constraints-cpu.txt"))


def test_gpus_get_the_same_versions() -> None:
    cpu = pins("constraints-cpu.txt")
    # torch brings the triton that it was built for.
    assert pins("constraints-cuda.txt") == {
        name: version for name, version in cpu.items() if name not in ("torch", "triton")
    }
