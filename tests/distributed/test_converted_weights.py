"""Weights from elsewhere under a layout that cuts them, and weights saved under it read by streaming."""

from pathlib import Path

import converter
import foreign_checkpoints as foreign
import runs
import torch
from pool import Pool

from megatron_iml.checkpoint.conversion.parameter_map import parameters
from megatron_iml.checkpoint.conversion.sources.native import NativeSource
from megatron_iml.checkpoint.weights import fill_weights
from megatron_iml.config import Config, ParallelConfig
from megatron_iml.model.initialise import initialise

TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True)


def fill_and_save(config: Config, native: Path, metaseq: Path, again: Path) -> runs.Outcome:
    """Start from a converted checkpoint, compare with starting from the foreign files, save."""
    engine = runs.fresh_engine(config)
    fill_weights(native, engine.chunks, config.model, engine.layout)
    filled = runs.outcome(engine, [])
    initialise(engine.chunks, config.model, 99, engine.layout)
    fill_weights(metaseq, engine.chunks, config.model, engine.layout)
    engine.optimizer.reload_model_params()
    for (name, ours), (_, theirs) in zip(filled.weights, runs.outcome(engine, []).weights, strict=True):
        assert torch.equal(ours.part, theirs.part), name
    runs.save(engine, again, 1)
    return filled


def test_tensor_and_pipeline_parallel(pool: Pool, tmp_path: Path) -> None:
    config = runs.run_config(parallel=TP2_PP2)
    model = config.model
    state = foreign.random_opt(
        model.num_layers, model.hidden_size, model.vocab_size, model.max_position_embeddings, torch.float32
    )
    # Parts that do not match the ranks, shards that do not match anything.
    foreign.write_metaseq(tmp_path / "metaseq", state, parts=4, shards=3, heads=model.num_attention_heads)
    native = tmp_path / "native"
    assert converter.run("native", tmp_path / "metaseq", native, "--inference-prefix", "none") == 0
    outcomes = pool.run(fill_and_save, 4, config, native, tmp_path / "metaseq", tmp_path / "run")
    weights = runs.full_weights(outcomes)
    converted = NativeSource(native)
    saved = NativeSource(tmp_path / "run" / "iter_0000001")
    assert weights.keys() == parameters(model).keys()
    for name, one in parameters(model).items():
        assert torch.equal(converted.read(one), weights[name]), name
        assert torch.equal(saved.read(one), weights[name]), name
    assert converter.run("hugging-face", saved.path, tmp_path / "out", "--verify") == 0
    exported = foreign.read_hugging_face(tmp_path / "out")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())
