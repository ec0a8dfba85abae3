"""What comes out of a checkpoint: weights alone, another precision, a refusal with a reason."""

from pathlib import Path

import pytest
import runs
import torch

from megatron_iml.checkpoint import load
from megatron_iml.checkpoint.load import check_share_of_files, load_run, load_weights
from megatron_iml.checkpoint.record import Record, StoredFile, read_record
from megatron_iml.model.initialise import initialise
from megatron_iml.model.transformer_config import PRECISIONS
from megatron_iml.training.engine import Engine


def masters(engine: Engine) -> list[torch.Tensor]:
    (optimizer,) = engine.optimizer.chained_optimizers
    return [param.detach().clone() for group in optimizer.optimizer.param_groups for param in group["params"]]


def test_weights_alone_leave_the_rest_fresh(tmp_path: Path) -> None:
    config = runs.run_config(num_layers=2)
    with runs.alone(config) as engine:
        runs.take_steps(engine, range(1))
        folder = runs.save(engine, tmp_path, 1)
        saved = runs.weights_of(engine)
    with runs.alone(config) as engine:
        initialise(engine.chunks, config.model, 99, engine.layout)
        load_weights(folder, engine.chunks, config.model)
        assert runs.same_bits(runs.weights_of(engine), saved)
        groups = engine.optimizer.chained_optimizers[0].optimizer.param_groups
        assert [group["step"] for group in groups] == [0, 0]


@pytest.mark.parametrize(
    ("saved_in", "loaded_in"), [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "fp16"), ("fp16", "bf16")]
)
def test_another_precision_rounds_the_master_weights_once(
    tmp_path: Path, saved_in: str, loaded_in: str
) -> None:
    with runs.alone(runs.run_config(saved_in, num_layers=2)) as engine:
        runs.take_steps(engine, range(2))
        folder = runs.save(engine, tmp_path, 2)
        saved = masters(engine)
    with runs.alone(runs.run_config(loaded_in, num_layers=2)) as engine:
        load_run(folder, engine)
        assert runs.same_bits(masters(engine), saved)
        # In whatever order, the weights are the master weights in this run's precision.
        total = sum(weight.double().sum() for weight in runs.weights_of(engine))
        rounded = sum(master.to(PRECISIONS[loaded_in]).double().sum() for master in saved)
        assert total == pytest.approx(float(rounded), rel=1e-12)
        runs.take_steps(engine, range(2, 3))
        # A save would find weights that do not follow from the master weights.
        runs.save(engine, tmp_path, 3)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        folder = runs.save(engine, tmp_path, 1)
    larger = runs.run_config(num_layers=4, hidden_size=128)
    with runs.alone(larger) as engine:
        before = runs.weights_of(engine)
        with pytest.raises(ValueError) as caught:
            load_run(folder, engine)
        with pytest.raises(ValueError, match="another size"):
            load_weights(folder, engine.chunks, larger.model)
        assert runs.same_bits(runs.weights_of(engine), before)
    assert (
        "is a model of another size: num_layers 4 here, 2 there; hidden_size 128 here, 64 there; "
        "ffn_hidden_size 512 here, 256 there. Set the model section"
    ) in str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_ranks_together_verify_every_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    files = {f"{kind}_{rank:05d}.distcp" for kind in ("weights", "optimizer") for rank in range(3)}
    record = Record(runs.state_at(1), {}, 3, {}, {}, "", dict.fromkeys(files, StoredFile(1, "")))
    read: list[str] = []
    monkeypatch.setattr(load, "check_files", lambda folder, files: read.extend(files))
    monkeypatch.setattr(load.dist, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(load.dist, "get_rank", lambda rank=rank: rank)
        check_share_of_files(tmp_path, record, weights_only=False)
    assert sorted(read) == sorted(files)


@pytest.mark.parametrize(("name", "weights_only"), [("weights", True), ("optimizer", False)])
def test_only_what_is_read_is_verified(tmp_path: Path, name: str, weights_only: bool) -> None:
    with runs.alone(runs.run_config(num_layers=2)) as engine:
        folder = runs.save(engine, tmp_path, 1)
        path = folder / f"{name}_00000.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        record = read_record(folder)
        with pytest.raises(ValueError, match=f"{path.name} holds other bytes than were written"):
            check_share_of_files(folder, record, weights_only)
        if name == "optimizer":
            check_share_of_files(folder, record, weights_only=True)
