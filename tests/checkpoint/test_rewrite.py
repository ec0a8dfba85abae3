"""Another precision and weights alone, written offline: what loads from them is what was asked for."""

from pathlib import Path

import pytest
import runs
import torch
from checkpoint.test_load import masters

from megatron_iml.checkpoint.load import load_run, load_weights
from megatron_iml.checkpoint.record import damage, read_record
from megatron_iml.checkpoint.rewrite import rewrite
from megatron_iml.model.initialise import initialise
from megatron_iml.model.transformer_config import PRECISIONS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A bf16 checkpoint after two steps, and its master weights."""
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        runs.take_steps(engine, range(2))
        return runs.save(engine, tmp_path_factory.mktemp("saved"), 2), masters(engine)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_precision_is_the_master_weights_rounded_once(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path, precision: str
) -> None:
    folder = tmp_path / "iter_0000002"
    read: list[int] = []
    record = rewrite(saved[0], folder, precision, False, read.append)
    assert record == read_record(folder) and damage(folder, record.files) == []
    assert record.config["training"]["precision"] == precision
    stored = read_record(saved[0]).files
    assert sum(read) == sum(stored[name].bytes for name in stored if name.endswith(".distcp"))
    config = runs.run_config(precision, num_layers=2)
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        load_run(folder, engine)
        assert runs.same_bits(masters(engine), saved[1])
        total = sum(weight.double().sum() for weight in runs.weights_of(engine))
        rounded = sum(master.to(PRECISIONS[precision]).double().sum() for master in saved[1])
        assert total == pytest.approx(float(rounded), rel=1e-12)
        # Weights that did not follow from the master weights would stop this.
        runs.save(engine, tmp_path, 3)


def test_weights_alone_are_a_start(saved: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> None:
    record = rewrite(saved[0], tmp_path / "weights", None, weights_only=True)
    assert not record.has_optimizer and record.total_bytes < 0.2 * read_record(saved[0]).total_bytes
    config = runs.run_config("bf16", num_layers=2)
    with runs.alone(config) as engine:
        load_weights(saved[0], engine.chunks, config.model)
        expected = runs.weights_of(engine)
        initialise(engine.chunks, config.model, 99, engine.layout)
        load_weights(tmp_path / "weights", engine.chunks, config.model)
        assert runs.same_bits(runs.weights_of(engine), expected)


def test_weights_alone_are_rounded_from_what_there_is(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    """Without master weights nothing is more exact than the weights themselves."""
    rewrite(saved[0], tmp_path / "weights", None, weights_only=True)
    record = rewrite(tmp_path / "weights", tmp_path / "fp32", "fp32", weights_only=False)
    assert damage(tmp_path / "fp32", record.files) == [] and not record.has_optimizer
    with runs.alone(runs.run_config("bf16", num_layers=2)) as engine:
        load_weights(saved[0], engine.chunks, engine.config.model)
        expected = [weight.float() for weight in runs.weights_of(engine)]
    config = runs.run_config("fp32", num_layers=2)
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        load_weights(tmp_path / "fp32", engine.chunks, config.model)
        assert runs.same_bits(runs.weights_of(engine), expected)


def test_nothing_is_overwritten_and_nothing_damaged_is_copied(
    saved: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="there exists, and nothing is overwritten"):
        rewrite(saved[0], tmp_path / "there", "fp32", weights_only=False)
    damaged = tmp_path / "iter_0000002"
    rewrite(saved[0], damaged, None, weights_only=False)
    path = damaged / "optimizer_00000.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="optimizer_00000.distcp has"):
        rewrite(damaged, tmp_path / "copy", "fp32", weights_only=True)
    assert not (tmp_path / "copy").exists()
    # The weights are whole, and need nothing else where no rounding is asked for.
    path.unlink()
    read: list[int] = []
    record = rewrite(damaged, tmp_path / "copy", None, weights_only=True, advance=read.append)
    assert damage(tmp_path / "copy", record.files) == []
    # What is left out is told all the same, or a progress bar would stop at a seventh.
    stored = read_record(saved[0]).files
    assert sum(read) == sum(stored[name].bytes for name in stored if name.endswith(".distcp"))
