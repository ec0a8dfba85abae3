"""Random weights: metaseq's recipe, and nothing but seed, name and shape decides them."""

import math

import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.model.build import build_model
from megatron_iml.model.initialise import initial_tensor, initialise
from megatron_iml.model.parameters import copy_full_tensor, named_global_parameters

MODEL = tiny_config(num_layers=8, init_method_std=0.05).model


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.position_embeddings.weight", 0.05),
        ("decoder.layers.0.self_attention.linear_qkv.weight", 0.05),
        ("decoder.layers.7.mlp.linear_fc1.weight", 0.05),
        ("decoder.layers.0.self_attention.linear_proj.weight", 0.05 / math.sqrt(16)),
        ("decoder.layers.3.mlp.linear_fc2.weight", 0.05 / math.sqrt(16)),
    ],
)
def test_standard_deviations(name: str, std: float) -> None:
    tensor = initial_tensor(name, (300, 300), MODEL, seed=1)
    # 90,000 draws: the deviation is known to 0.24 %, the mean to std / 300.
    assert abs(tensor.std() / std - 1) < 0.012
    assert abs(tensor.mean()) < 5 * std / 300


def test_constants() -> None:
    assert (initial_tensor("decoder.layers.0.input_layernorm.weight", (5,), MODEL, 1) == 1).all()
    assert (initial_tensor("decoder.final_layernorm.bias", (5,), MODEL, 1) == 0).all()
    assert (initial_tensor("decoder.layers.0.mlp.linear_fc1.bias", (5,), MODEL, 1) == 0).all()
    words = initial_tensor("embedding.word_embeddings.weight", (8, 4), MODEL, 1)
    assert (words[1] == 0).all() and (words[[0, *range(2, 8)]] != 0).all()
    positions = initial_tensor("embedding.position_embeddings.weight", (8, 4), MODEL, 1)
    assert (positions[:2] == 0).all() and (positions[2:] != 0).all()


def test_seed_and_name_decide() -> None:
    draw = initial_tensor("decoder.layers.0.mlp.linear_fc1.weight", (4, 4), MODEL, 1)
    assert torch.equal(draw, initial_tensor("decoder.layers.0.mlp.linear_fc1.weight", (4, 4), MODEL, 1))
    assert not torch.equal(draw, initial_tensor("decoder.layers.1.mlp.linear_fc1.weight", (4, 4), MODEL, 1))
    assert not torch.equal(draw, initial_tensor("decoder.layers.0.mlp.linear_fc1.weight", (4, 4), MODEL, 2))


def test_every_parameter_of_a_model_is_filled() -> None:
    config = tiny_config()
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        for _, parameter in named_global_parameters(chunks):
            parameter.data.fill_(float("nan"))
        initialise(chunks, config.model, 3, layout)
        for name, parameter in named_global_parameters(chunks):
            assert torch.equal(parameter, initial_tensor(name, tuple(parameter.shape), config.model, 3)), name


def test_slices_of_a_whole_tensor() -> None:
    full = torch.arange(24.0).view(6, 4)
    column, row, whole = (torch.nn.Parameter(torch.empty(shape)) for shape in ((3, 4), (6, 2), (6, 4)))
    for parameter, dim in ((column, 0), (row, 1)):
        parameter.tensor_model_parallel, parameter.partition_dim = True, dim
    for parameter in (column, row, whole):
        copy_full_tensor(parameter, full, tensor_rank=1, tensor_size=2)
    assert torch.equal(column, full[3:]) and torch.equal(row, full[:, 2:]) and torch.equal(whole, full)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) does not fit a parameter of \(6, 4\)"):
        whole.tensor_model_parallel, whole.partition_dim = True, 0
        copy_full_tensor(whole, full, tensor_rank=0, tensor_size=2)
