"""The table of names: complete, and its one rule as the docstring draws it."""

import torch
from helpers import single_rank, tiny_config

from megatron_iml.checkpoint.conversion.parameter_map import (
    from_metaseq_qkv,
    fuse_qkv,
    groups,
    parameters,
    split_qkv,
    to_metaseq_qkv,
)
from megatron_iml.config import parameter_count
from megatron_iml.model.build import build_model
from megatron_iml.model.parameters import global_shape, named_global_parameters, tensor_parallel_dim


def rows(text: str) -> torch.Tensor:
    """A matrix of two columns: `q1` is 10 + 1, `k` and `v` rows 20 and 30 more."""
    base = {"q": 10, "k": 20, "v": 30}
    return torch.tensor([[base[name[0]] + int(name[1]), 0] for name in text.split()])


def test_the_table_is_the_models_parameters_shapes_and_cuts() -> None:
    config = tiny_config(num_layers=3)
    table = parameters(config.model)
    with single_rank(config) as layout:
        found = dict(named_global_parameters(build_model(config, layout)))
        assert table.keys() == found.keys()
        for name, parameter in found.items():
            assert table[name].shape == global_shape(parameter, 1), name
            assert table[name].cut == tensor_parallel_dim(parameter), name
    assert sum(torch.Size(one.shape).numel() for one in table.values()) == parameter_count(config.model)
    labels = [label for label, _ in groups(config.model)]
    assert labels == ["embeddings and final norm", "layer 0", "layer 1", "layer 2"]


def test_names_of_a_layer() -> None:
    one = parameters(tiny_config().model)["decoder.layers.1.pre_mlp_layernorm.bias"]
    assert one.hugging_face == ("decoder.layers.1.final_layer_norm.bias",)
    assert one.metaseq == "decoder.layers.1.final_layer_norm.bias"
    last = parameters(tiny_config().model)["decoder.final_layernorm.bias"]
    assert (last.hugging_face, last.metaseq) == (
        ("decoder.final_layer_norm.bias",),
        "decoder.layer_norm.bias",
    )


def test_the_rule_of_the_fused_projection_is_the_drawn_one() -> None:
    ours = rows("q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3")
    parts = [rows("q0 q1 q2 q3"), rows("k0 k1 k2 k3"), rows("v0 v1 v2 v3")]
    assert torch.equal(fuse_qkv(parts, head_dim=1), ours)
    assert all(torch.equal(one, other) for one, other in zip(split_qkv(ours, 1), parts, strict=True))
    metaseq = [rows("k0 k1 v0 v1 q0 q1"), rows("k2 k3 v2 v3 q2 q3")]
    for part, own in zip(metaseq, ours.chunk(2), strict=True):
        assert torch.equal(from_metaseq_qkv(part, head_dim=1), own)
        assert torch.equal(to_metaseq_qkv(own, head_dim=1), part)


def test_heads_of_several_rows_stay_together() -> None:
    parts = [torch.arange(start, start + 6) for start in (0, 10, 20)]
    fused = fuse_qkv(parts, head_dim=3)
    assert fused.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 3, 4, 5, 13, 14, 15, 23, 24, 25]
