"""A converted native checkpoint is one of ours: megatron-core loads it, and the losses are the source's."""

import json
from pathlib import Path

import converter
import foreign_checkpoints as foreign
import numpy as np
import pytest
import runs
import torch
from helpers import single_rank, tiny_config

from megatron_iml.checkpoint.conversion.formats import open_source
from megatron_iml.checkpoint.conversion.parameter_map import parameters
from megatron_iml.checkpoint.conversion.sources.native import NativeSource
from megatron_iml.checkpoint.weights import fill_weights
from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.model.build import build_model
from megatron_iml.model.initialise import initialise
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.model.row import to_device

transformers = pytest.importorskip("transformers")

SHAPE = {
    "num_layers": foreign.LAYERS,
    "hidden_size": foreign.HIDDEN,
    "num_attention_heads": foreign.HEADS,
    "vocab_size": foreign.VOCAB,
    "max_position_embeddings": foreign.POSITIONS,
}


def loaded(folder: Path, tokens: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Weights and losses of our own model, filled from a checkpoint the way a run starts."""
    config = tiny_config(**SHAPE)
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 1, layout)
        fill_weights(folder, chunks, config.model, layout)
        row = assemble_row([Piece(tokens, 0)], len(tokens) - 1, index=0)
        losses = chunks[0].eval()(to_device(row, layout.device)).losses_M.detach().numpy()
        return {name: one.detach().clone() for name, one in named_global_parameters(chunks)}, losses


def test_a_run_starts_from_it_with_the_losses_of_transformers(tmp_path) -> None:
    state = foreign.random_opt(dtype=torch.float32)
    foreign.write_hugging_face(tmp_path / "hf", state)
    foreign.write_metaseq(tmp_path / "metaseq", state, parts=2, shards=3)
    places = (tmp_path / "metaseq", tmp_path / "native")
    assert converter.run("native", *places, "--inference-prefix", "eos") == 0
    tokens = np.random.default_rng(0).integers(4, foreign.VOCAB, foreign.POSITIONS).astype(np.int32)
    weights, losses = loaded(tmp_path / "native", tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.from_numpy(tokens)[None].long()
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    # Two fp32 implementations of two layers; a swapped tensor changes losses by tenths.
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-5, atol=1e-5)
    for folder in ("hf", "metaseq"):
        others, _ = loaded(tmp_path / folder, tokens)
        assert all(torch.equal(weights[name], others[name]) for name in weights), folder
    assert open_source(tmp_path / "native").prefix == "eos"


def test_a_vocabulary_of_odd_length_is_padded_with_zeros(tmp_path) -> None:
    state = foreign.random_opt(vocab=45)
    foreign.write_hugging_face(tmp_path / "in", state)
    assert converter.run("native", tmp_path / "in", tmp_path / "n", "--inference-prefix", "none") == 0
    source = NativeSource(tmp_path / "n")
    assert source.model.vocab_size == 48
    words = source.read(parameters(source.model)["embedding.word_embeddings.weight"])
    assert torch.equal(words[:45], state["decoder.embed_tokens.weight"]) and not words[45:].any()
    places = (tmp_path / "n", tmp_path / "out")
    assert converter.run("hugging-face", *places, "--vocab-size", "45", "--verify") == 0
    assert foreign.read_hugging_face(tmp_path / "out").keys() == state.keys()
    for name, tensor in foreign.read_hugging_face(tmp_path / "out").items():
        assert torch.equal(tensor, state[name]), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 45


def test_weights_of_a_training_checkpoint_are_read_without_a_process_group(tmp_path) -> None:
    with runs.alone(runs.run_config("bf16", num_layers=3)) as engine:
        runs.take_steps(engine, range(1))
        folder = runs.save(engine, tmp_path, 1)
        expected = {name: one.detach().clone() for name, one in named_global_parameters(engine.chunks)}
    source = NativeSource(folder)
    table = parameters(source.model)
    assert table.keys() == expected.keys()
    for name, tensor in expected.items():
        assert source.dtype(table[name]) == torch.bfloat16 and torch.equal(
            source.read(table[name]), tensor
        ), name


def test_another_shape_is_refused_before_anything_is_read(tmp_path) -> None:
    foreign.write_metaseq(tmp_path / "in", foreign.random_opt(), parts=2)
    config = tiny_config(**{**SHAPE, "num_layers": 3})
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        with pytest.raises(ValueError, match="another size: num_layers 3 here, 2 there"):
            fill_weights(tmp_path / "in", chunks, config.model, layout)
    smaller = tiny_config(**{**SHAPE, "vocab_size": 40})
    with single_rank(smaller) as layout:
        chunks = build_model(smaller, layout)
        with pytest.raises(ValueError, match="48 embedding rows but model.vocab_size is 40"):
            fill_weights(tmp_path / "in", chunks, smaller.model, layout)
