"""Exact parameter counts: the model as built, for every size of the family, without allocating it."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.config import OPT_SIZES, ModelConfig, parameter_count
from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.model.build import build_model
from megatron_iml.model.initialise import initialise
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.model.row import to_device
from megatron_iml.parallel.fake_world import fake_world


@pytest.mark.parametrize("size", OPT_SIZES)
def test_built_model_has_the_published_number_of_parameters(size: str) -> None:
    layers, hidden, heads = OPT_SIZES[size]
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_hidden_size=4 * hidden
    )
    config = dataclasses.replace(tiny_config("bf16"), model=model)
    with fake_world(config, rank=0, world_size=1) as layout:
        parameters = dict(named_global_parameters(build_model(config, layout)))
    assert sum(parameter.numel() for parameter in parameters.values()) == parameter_count(model)
    assert parameters[f"decoder.layers.{layers - 1}.self_attention.linear_qkv.weight"].shape == (
        3 * hidden,
        hidden,
    )
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}


def test_every_module_is_called_for_its_weights() -> None:
    """Overlapped parameter gathers wait in a hook of the module that owns a weight: one that is only read
    from outside, as a tied head's, would be used before it has arrived."""
    config = tiny_config()
    called: set[str] = set()
    with single_rank(config) as layout:
        (chunk,) = build_model(config, layout)
        initialise([chunk], config.model, 1, layout)
        for name, module in chunk.named_modules():
            module.register_forward_pre_hook(lambda *unused, name=name: called.add(name))
        chunk(to_device(assemble_row([Piece(np.arange(4, 13), 3)], 16, index=0), layout.device))
        owners = {name.rpartition(".")[0] for name, _ in chunk.named_parameters()}
    # It holds no weight here, but on a pipeline's last stage it does.
    assert called >= owners | {"output_layer"}
