"""Parameters by their global names, whatever the layout: what initialisation and weight import share.

Each stage numbers its layers from 0; globally, layer 3 is `decoder.layers.3` on whichever rank it lives. The
last stage's copy of the tied embedding carries the embedding's name.

    OPT with 4 layers on two stages
        first: embedding.word_embeddings.weight, ..., decoder.layers.1.mlp.linear_fc2.bias
        last:  decoder.layers.2.input_layernorm.weight, ..., embedding.word_embeddings.weight
"""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .opt import OPTModel

_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def named_global_parameters(chunks: Sequence[OPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield (global name, local parameter) of every parameter on this rank."""
    # No name comes twice: a head on the embedding's own chunk has no weight.
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            # Filled like the first stage's copy; megatron-core keeps them equal from then on.
            if name == "output_layer.weight":
                yield "embedding.word_embeddings.weight", parameter
                continue
            local = _LOCAL_LAYER.match(name)
            if local:
                name = f"decoder.layers.{int(local[1]) + chunk.first_layer}.{name[local.end() :]}"
            yield name, parameter


def tensor_parallel_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter, or None if every rank holds all of
    it."""
    # megatron-core marks sharded parameters with attributes of its own.
    attributes = vars(parameter)
    return attributes["partition_dim"] if attributes.get("tensor_model_parallel", False) else None


def copy_full_tensor(parameter: torch.nn.Parameter, full: Tensor, tensor_rank: int, tensor_size: int) -> None:
    """Copy this rank's slice of a whole tensor into its parameter.

    Raises:
        ValueError: if the shapes do not fit.
    """
    dim = tensor_parallel_dim(parameter)
    # Equal parts: the config asks the tensor size to divide every cut dimension.
    shard = full if dim is None else full.chunk(tensor_size, dim)[tensor_rank]
    if shard.shape != parameter.shape:
        raise ValueError(
            f"a shard of shape {tuple(shard.shape)} does not fit a parameter of {tuple(parameter.shape)}; "
            "these are weights of another model: name those of this one, or change the model section"
        )
    with torch.no_grad():
        parameter.copy_(shard)


def global_shape(parameter: torch.nn.Parameter, tensor_size: int) -> tuple[int, ...]:
    """Shape of the whole tensor this parameter is a slice of."""
    shape = list(parameter.shape)
    dim = tensor_parallel_dim(parameter)
    if dim is not None:
        shape[dim] *= tensor_size
    return tuple(shape)
