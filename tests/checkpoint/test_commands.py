"""tools/checkpoint/show.py and reshard.py: what they print, and their exit status."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import runs

from megatron_iml.checkpoint.record import read_record

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint"


def command(name: str) -> ModuleType:
    """In this process: one of its own would import torch every time."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None, f"{name} cannot be imported"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two checkpoints of a model of 4 layers and 4 heads."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with runs.alone(runs.run_config("bf16")) as engine:
        for step in (1, 2):
            runs.save(engine, folder, step)
    return folder


@pytest.mark.parametrize("name", ["show", "reshard"])
def test_help_imports_nothing_heavy(name: str) -> None:
    program = (
        f"import runpy, sys; runpy.run_path({str(TOOLS / f'{name}.py')!r}); "
        "print(*{'torch', 'megatron', 'rich', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_show_lists_and_describes(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = command("show")
    assert show.main([str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["iter_0000001", "1", "4"],
        ["iter_0000002", "2", "8"],
    ]
    assert show.main([str(saved / "iter_0000002"), "--verify", "--tensors"]) == 0
    printed = capsys.readouterr().out
    record = read_record(saved / "iter_0000002")
    said = (
        f"SHA-256 {record.config_sha256}",
        "tensor 1 x pipeline 1 x data 1",
        "4 layers x 64, vocabulary 96",
        f"{record.total_bytes:,} bytes",
        "5 files, every byte as it was written",
    )
    assert all(text in printed for text in said), printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["decoder.layers.mlp.linear_fc1.weight", "bfloat16", "[4,", "256,", "64]", "4"] in rows
    assert ["optimizer.state.exp_avg.embedding.word_embeddings.weight", "float32", "[96,", "64]", "1"] in rows


def test_show_names_what_is_damaged_or_absent(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show = command("show")
    assert show.main([str(tmp_path)]) == 2
    assert "is no complete checkpoint" in capsys.readouterr().err
    whole = saved / "iter_0000001"
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "common.pt").write_bytes(b"")
    assert show.main([str(tmp_path)]) == 0
    assert show.main([str(tmp_path), "--verify"]) == 2
    assert "common.pt has 0 bytes" in capsys.readouterr().err


def test_reshard_says_which_layouts_load(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reshard, checkpoint = command("reshard"), str(saved / "iter_0000002")
    layout = ("--world-size", "8", "--tensor", "2", "--pipeline", "2", "--chunks", "2")
    assert reshard.main(["check", checkpoint, *layout]) == 0
    assert "loads: tensor 2 x pipeline 2 x data 2; a rank reads about 0.000 GB" in capsys.readouterr().out
    assert reshard.main(["check", checkpoint, "--world-size", "3", "--tensor", "2"]) == 2
    assert "world size: got 3; allowed: a multiple of" in capsys.readouterr().err


def test_reshard_says_that_weights_alone_are_a_start(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reshard, output = command("reshard"), str(tmp_path / "weights")
    assert reshard.main(["write", str(saved / "iter_0000002"), "--output", output, "--weights-only"]) == 0
    capsys.readouterr()
    assert reshard.main(["check", output, "--world-size", "1"]) == 0
    assert "no optimizer state: a start (checkpoint.initial_weights)" in capsys.readouterr().out


def test_reshard_writes_what_was_asked(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reshard, checkpoint = command("reshard"), str(saved / "iter_0000002")
    output = tmp_path / "iter_0000002"
    # As on a terminal, with the result going into a file: the bar must not.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert reshard.main(["write", checkpoint, "--output", str(output)]) == 2
    assert "got neither --precision nor --weights-only" in capsys.readouterr().err
    assert reshard.main(["write", checkpoint, "--output", str(output), "--precision", "fp32"]) == 0
    assert capsys.readouterr().out == f"{output}: {read_record(output).total_bytes:,} bytes in 5 files\n"
    assert command("show").main([str(output), "--verify"]) == 0
