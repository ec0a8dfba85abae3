"""The wheel: one top-level name, kernels inside it under one identity, importable from anywhere."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
import megatron_iml.kernels.document_attention as op
assert "kernels" not in sys.modules, "imported a second time as kernels"
print(op.__name__, op.__file__)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked as pip would install it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, since setuptools writes build/ and *.egg-info beside the source.
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megatron_iml", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_owns_one_top_level_name(site: Path) -> None:
    names = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert names == {"megatron_iml"}


def test_the_wheel_holds_every_module(site: Path) -> None:
    package = {path.relative_to(ROOT) for path in (ROOT / "megatron_iml").rglob("*.py")}
    kernels = {Path("megatron_iml") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert {path.relative_to(site) for path in site.rglob("*.py")} == package | kernels


def test_the_wheel_holds_the_tables(site: Path) -> None:
    tables = {path.relative_to(ROOT) for path in (ROOT / "megatron_iml").rglob("*.yaml")}
    assert Path("megatron_iml/data/taxonomy/categories.yaml") in tables
    assert {path.relative_to(site) for path in site.rglob("*.yaml")} == tables


def test_kernels_have_one_identity_from_a_foreign_folder(site: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, file = done.stdout.split()
    assert name == "megatron_iml.kernels.document_attention"
    assert Path(file).is_relative_to(site)


def test_the_link_is_relative() -> None:
    # An absolute link would work on the machine that made it and nowhere else.
    assert (ROOT / "megatron_iml" / "kernels").readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()
