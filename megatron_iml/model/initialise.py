"""Random weights that do not depend on the layout.

Each tensor is drawn whole from a generator seeded with (seed, global name), then sliced: the same model under
any tensor, pipeline and data parallel size. The recipe is metaseq's `--full-megatron-init`: N(0, std)
everywhere, output projections N(0, std / sqrt(2 x layers)), biases 0, LayerNorm 1 and 0, rows that stand for
padding 0.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_iml.config import POSITION_OFFSET, ModelConfig
from megatron_iml.data.rows.assemble import PAD_ID
from megatron_iml.parallel.groups import Layout

from .opt import OPTModel
from .parameters import copy_full_tensor, global_shape, named_global_parameters

CPU = torch.device("cpu")


def initialise(
    chunks: Sequence[OPTModel], model: ModelConfig, seed: int, layout: Layout, draw_on: torch.device = CPU
) -> None:
    """Fill every parameter of this rank's stage.

    `draw_on` is where random numbers come from: CUDA generators are quick and give other numbers on other
    devices, which only a benchmark may do.
    """
    # Whole, and then cut: a rank that drew its slice alone would draw other numbers under another layout.
    for name, parameter in named_global_parameters(chunks):
        full = initial_tensor(name, global_shape(parameter, layout.tensor_size), model, seed, draw_on)
        copy_full_tensor(parameter, full, layout.tensor_rank, layout.tensor_size)


def initial_tensor(
    name: str, shape: tuple[int, ...], model: ModelConfig, seed: int, draw_on: torch.device = CPU
) -> Tensor:
    """The whole initial tensor of one parameter, fp32."""
    if "layernorm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    is_output = "linear_proj" in name or "linear_fc2" in name
    std = model.init_method_std / math.sqrt(2 * model.num_layers) if is_output else model.init_method_std
    # Not `hash()`, which Python salts per process. 7 bytes fit the generator's signed 64-bit seed.
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(draw_on).manual_seed(int.from_bytes(digest, "little"))
    # In fp32, which the copy rounds: precisions start from one model.
    tensor = torch.empty(shape, device=draw_on).normal_(0.0, std, generator=generator)
    if name == "embedding.word_embeddings.weight":
        tensor[PAD_ID] = 0.0
    if name == "embedding.position_embeddings.weight":
        tensor[:POSITION_OFFSET] = 0.0
    return tensor
