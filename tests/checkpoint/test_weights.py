"""Weights that a run starts from: what is wrong with a folder is said, and only what is read is looked at."""

from pathlib import Path

import pytest
import runs

from megatron_iml.checkpoint.weights import check_weights, fill_weights
from megatron_iml.model.initialise import initialise


def test_a_folder_that_is_not_there_is_refused_with_what_may_be_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; name a Hugging Face OPT folder or a native"):
        check_weights(tmp_path / "nowhere", runs.run_config().model)
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint"):
        check_weights(tmp_path, runs.run_config().model)


def test_a_native_checkpoint_is_verified_and_its_optimizer_not_missed(tmp_path: Path) -> None:
    config = runs.run_config("bf16", num_layers=2)
    with runs.alone(config) as engine:
        runs.take_steps(engine, range(1))
        folder, saved = runs.save(engine, tmp_path, 1), runs.weights_of(engine)
        (folder / "optimizer_00000.distcp").unlink()
        initialise(engine.chunks, config.model, 99, engine.layout)
        others = runs.weights_of(engine)
        whole = (folder / "weights_00000.distcp").read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        (folder / "weights_00000.distcp").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"weights_00000.distcp holds other bytes than were written"):
            fill_weights(folder, engine.chunks, config.model, engine.layout)
        assert runs.same_bits(runs.weights_of(engine), others)
        (folder / "weights_00000.distcp").write_bytes(whole)
        fill_weights(folder, engine.chunks, config.model, engine.layout)
        assert runs.same_bits(runs.weights_of(engine), saved)
