"""Exact parameter counts: the model as built, for every size of the family, without allocating it."""

import dataclasses

import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.config import OPT_SIZES, ModelConfig, parameter_count
from megatron_iml.model.build import build_model
from megatron_iml.model.parameters import named_global_parameters


@pytest.mark.parametrize("size", OPT_SIZES)
def test_built_model_has_the_published_number_of_parameters(
    size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, hidden, heads = OPT_SIZES[size]
    model = ModelConfig(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, ffn_hidden_size=4 * hidden
    )
    config = dataclasses.replace(tiny_config("bf16"), model=model)
    with single_rank(config) as layout:
        # Parallel linears ask for the current device, the rest for the layout's.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        chunks = build_model(config, dataclasses.replace(layout, device=torch.device("meta")))
        parameters = dict(named_global_parameters(chunks))
        monkeypatch.undo()
    assert sum(parameter.numel() for parameter in parameters.values()) == parameter_count(model)
    assert parameters[f"decoder.layers.{layers - 1}.self_attention.linear_qkv.weight"].shape == (
        3 * hidden,
        hidden,
    )
    assert {parameter.dtype for parameter in parameters.values()} == {torch.bfloat16}
