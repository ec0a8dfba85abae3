"""Whatever moment a conversion dies at: no output, or the whole of it; and the same command goes on."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import converter
import foreign_checkpoints as foreign
import pytest
import torch

from megatron_iml.checkpoint.conversion.formats import open_source
from megatron_iml.checkpoint.conversion.parameter_map import parameters
from megatron_iml.checkpoint.conversion.partial import JOURNAL, PartialFolder

pytest.importorskip("safetensors")

FORMS = {
    "native": ("--inference-prefix", "none"),
    "hugging-face": ("--max-shard-bytes", "100000"),
    "metaseq": ("--parts", "2", "--shards", "3"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "in"
    foreign.write_hugging_face(folder, foreign.random_opt(layers=12, hidden=64))
    return folder


def partial_of(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def groups_done(output: Path) -> int:
    """Groups in the journal, the last of which may be cut short."""
    journal = partial_of(output) / JOURNAL
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.is_file() else 0


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = open_source(one, foreign.HEADS), open_source(other, foreign.HEADS)
    for parameter in parameters(theirs.model).values():
        assert torch.equal(ours.read(parameter), theirs.read(parameter)), parameter.name


def killed_after(seconds: float, form: str, source: Path, output: Path) -> bool:
    """Run a conversion in a process of its own and kill it; whether it was killed before its end."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: os._exit(converter.run(form, source, output, *FORMS[form]))
    )
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("moments", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, source, form, moments) -> None:
    began = time.monotonic()
    assert converter.run(form, source, tmp_path / "whole", *FORMS[form]) == 0
    duration = time.monotonic() - began
    rng, output, kills, taken_up = random.Random(form), tmp_path / "out", 0, 0
    # A conversion goes on where it stopped, so the later moments need a new start now and then.
    for _ in range(200):
        before = groups_done(output)
        was_killed = killed_after(rng.uniform(0, duration), form, source, output)
        kills += was_killed
        taken_up += before > 0
        if output.exists():
            assert_same_weights(output, source)
            assert not partial_of(output).exists()
            shutil.rmtree(output)
        else:
            assert was_killed and groups_done(output) >= before
        if kills >= moments and taken_up:
            break
    assert kills >= moments and taken_up, f"{kills} kills, {taken_up} conversions taken up"
    assert converter.run(form, source, output, *FORMS[form]) == 0
    assert_same_weights(output, source)
    manifests = [
        json.loads((folder / "conversion.json").read_text()) for folder in (output, tmp_path / "whole")
    ]
    assert manifests[0] == manifests[1]


def stop_after(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt at the end of so many groups."""
    write, labels = PartialFolder.write_group, []

    def counted(self: PartialFolder, label: str, pieces: object) -> None:
        if len(labels) == number:
            raise KeyboardInterrupt
        labels.append(label)
        write(self, label, pieces)

    monkeypatch.setattr(PartialFolder, "write_group", counted)


def test_what_is_done_is_not_done_again(tmp_path, source, monkeypatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            converter.run("native", source, output, *FORMS["native"])
    assert groups_done(output) == 5 and not output.exists()
    journal = partial_of(output) / JOURNAL
    # As a kill in the middle of an entry leaves it.
    journal.write_bytes(journal.read_bytes() + b'{"group": "layer 4", "tens')
    labels = []
    write = PartialFolder.write_group

    def noted(self: PartialFolder, label: str, pieces: object) -> None:
        labels.append(label)
        write(self, label, pieces)

    monkeypatch.setattr(PartialFolder, "write_group", noted)
    assert converter.run("native", source, output, *FORMS["native"]) == 0
    assert labels == [f"layer {layer}" for layer in range(4, 12)]
    assert_same_weights(output, source)


def test_another_conversion_does_not_take_over(tmp_path, source, monkeypatch, capsys) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            converter.run("native", source, output, "--inference-prefix", "none")
    assert converter.run("native", source, output, "--inference-prefix", "eos") == 2
    message = capsys.readouterr().err
    assert f"{partial_of(output)} was begun by a conversion that differs in target, model: remove" in message
    os.utime(source / "model.safetensors", (1, 1))
    assert converter.run("native", source, output, "--inference-prefix", "none") == 2
    assert "differs in source" in capsys.readouterr().err
    assert groups_done(output) == 2


def test_nothing_is_overwritten_and_one_process_writes(tmp_path, source, capsys) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("precious")
    assert converter.run("native", source, output, *FORMS["native"]) == 2
    assert f"error: {output} exists; nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == ["mine"]
    other = tmp_path / "other"
    with PartialFolder(other, {}, {"a": 1}):
        assert converter.run("native", source, other, *FORMS["native"]) == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path, source, form, capsys) -> None:
    """A limit on the size of files fails writes beyond it, as a full disk or a quota does."""
    output = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert converter.run(form, source, output, *FORMS[form]) == 0
    sizes = [path.stat().st_size for path in output.iterdir()]
    shutil.rmtree(output)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) // 2, before[1]))
    try:
        assert converter.run(form, source, output, *FORMS[form]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert "File too large" in message and str(partial_of(output)) in message and not output.exists()
    assert converter.run(form, source, output, *FORMS[form]) == 0
    assert_same_weights(output, source)


def test_a_disk_that_fills_up_is_named_with_the_tensor(tmp_path, source, monkeypatch, capsys) -> None:
    output, write = tmp_path / "out", os.pwrite

    def fills_up(descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("weights_00003.distcp"):
            raise OSError(28, "No space left on device")
        # Short writes happen too.
        return write(descriptor, data[:1000], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fills_up)
        assert converter.run("native", source, output, *FORMS["native"]) == 2
    message = capsys.readouterr().err
    assert "weights_00003.distcp: tensor decoder.layers.2.self_attention.linear_qkv.weight" in message
    assert "(No space left on device)" in message and "goes on after 3 groups" in message
    assert not output.exists()
    assert converter.run("native", source, output, *FORMS["native"]) == 0
    assert_same_weights(output, source)


def test_too_small_a_disk_is_refused_at_once(tmp_path, source, monkeypatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert converter.run("native", source, tmp_path / "out", *FORMS["native"]) == 2
    assert "1,000 are free there" in capsys.readouterr().err
    assert list(partial_of(tmp_path / "out").iterdir()) == []
