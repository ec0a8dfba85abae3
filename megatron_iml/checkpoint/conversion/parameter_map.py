"""Names of OPT's tensors here, in Hugging Face's format and in metaseq's: one table, read in all directions.

A `*` stands for the layer's number. Most tensors carry over as they are; the fused projection has the one
rule. Here each head's query, key and value rows lie side by side, so that a tensor-parallel slice is whole
heads; Hugging Face has three matrices; metaseq has key, value and query rows, in that order, in every part.

    here        decoder.layers.7.self_attention.linear_qkv.weight    q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3
    HF          decoder.layers.7.self_attn.{q,k,v}_proj.weight       q0 q1 q2 q3 | k0 k1 k2 k3 | v0 v1 v2 v3
    metaseq     decoder.layers.7.self_attn.qkv_proj.weight, 2 parts  k0 k1 v0 v1 q0 q1 | k2 k3 v2 v3 q2 q3
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_iml.config import ModelConfig
from megatron_iml.config.sizes import POSITION_OFFSET

WORD_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Row:
    """One tensor of the table; names hold `*` for a layer's number."""

    ours: str
    hugging_face: tuple[str, ...]
    """One name, or query, key and value."""
    metaseq: str
    shape: tuple[str, ...]
    """Words of `_sizes`."""
    cut: int | None = None
    """The dimension that tensor parallelism divides, here and in metaseq; None: each part has all of it."""


def _layer(
    ours: str, hugging_face: Sequence[str], metaseq: str, shape: tuple[str, ...], cut: int | None = None
) -> Row:
    # In all three formats.
    begin = "decoder.layers.*."
    return Row(begin + ours, tuple(begin + name for name in hugging_face), begin + metaseq, shape, cut)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")


# In metaseq's order of modules, which is the order inside its flat parameters. OPT calls the norm before its
# feed-forward final_layer_norm, in every layer; Hugging Face calls the norm after the stack so as well.
TABLE: tuple[Row, ...] = (
    Row(
        WORD_EMBEDDING,
        ("decoder.embed_tokens.weight",),
        "decoder.embed_tokens.weight",
        ("vocab", "hidden"),
        0,
    ),
    Row(
        "embedding.position_embeddings.weight",
        ("decoder.embed_positions.weight",),
        "decoder.embed_positions.weight",
        ("positions", "hidden"),
    ),
    Row(
        "decoder.final_layernorm.weight",
        ("decoder.final_layer_norm.weight",),
        "decoder.layer_norm.weight",
        ("hidden",),
    ),
    Row(
        "decoder.final_layernorm.bias",
        ("decoder.final_layer_norm.bias",),
        "decoder.layer_norm.bias",
        ("hidden",),
    ),
    _layer(
        "self_attention.linear_qkv.weight",
        _qkv("weight"),
        "self_attn.qkv_proj.weight",
        ("qkv", "hidden"),
        0,
    ),
    _layer("self_attention.linear_qkv.bias", _qkv("bias"), "self_attn.qkv_proj.bias", ("qkv",), 0),
    # Row-parallel, as fc2: each part has some inputs of every output, so columns are cut. The bias is added
    # once, after the parts are summed, and is whole in each.
    _layer(
        "self_attention.linear_proj.weight",
        ["self_attn.out_proj.weight"],
        "self_attn.out_proj.weight",
        ("hidden", "hidden"),
        1,
    ),
    _layer(
        "self_attention.linear_proj.bias", ["self_attn.out_proj.bias"], "self_attn.out_proj.bias", ("hidden",)
    ),
    _layer(
        "input_layernorm.weight",
        ["self_attn_layer_norm.weight"],
        "self_attn_layer_norm.weight",
        ("hidden",),
    ),
    _layer("input_layernorm.bias", ["self_attn_layer_norm.bias"], "self_attn_layer_norm.bias", ("hidden",)),
    _layer("mlp.linear_fc1.weight", ["fc1.weight"], "fc1.weight", ("ffn", "hidden"), 0),
    _layer("mlp.linear_fc1.bias", ["fc1.bias"], "fc1.bias", ("ffn",), 0),
    _layer("mlp.linear_fc2.weight", ["fc2.weight"], "fc2.weight", ("hidden", "ffn"), 1),
    _layer("mlp.linear_fc2.bias", ["fc2.bias"], "fc2.bias", ("hidden",)),
    _layer("pre_mlp_layernorm.weight", ["final_layer_norm.weight"], "final_layer_norm.weight", ("hidden",)),
    _layer("pre_mlp_layernorm.bias", ["final_layer_norm.bias"], "final_layer_norm.bias", ("hidden",)),
)


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model: a row of the table with the layer's number and the sizes filled in."""

    name: str
    hugging_face: tuple[str, ...]
    metaseq: str
    shape: tuple[int, ...]
    cut: int | None
    layer: int | None

    @property
    def is_qkv(self) -> bool:
        """Whether it is the fused projection, the one tensor that is laid out differently everywhere."""
        return len(self.hugging_face) == 3


def groups(model: ModelConfig) -> Iterator[tuple[str, list[Parameter]]]:
    """Yield every parameter in groups: embeddings and the last norm, then layer by layer."""
    # First, as in metaseq's modules: flat parameters hold these in one vector of their own.
    yield "embeddings and final norm", [_fill(row, None, model) for row in TABLE if "*" not in row.ours]
    for layer in range(model.num_layers):
        yield f"layer {layer}", [_fill(row, layer, model) for row in TABLE if "*" in row.ours]


def parameters(model: ModelConfig) -> dict[str, Parameter]:
    """Every parameter by our name."""
    return {parameter.name: parameter for _, group in groups(model) for parameter in group}


def _sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "vocab": model.vocab_size,
        # Rows 0 and 1 are in every format and never looked up: the first position is row 2.
        "positions": model.max_position_embeddings + POSITION_OFFSET,
        "hidden": model.hidden_size,
        "qkv": 3 * model.hidden_size,
        "ffn": model.ffn_hidden_size,
    }


def _fill(row: Row, layer: int | None, model: ModelConfig) -> Parameter:
    # "None" outside of layers, whose names have no star for it to replace.
    number, sizes = str(layer), _sizes(model)
    return Parameter(
        name=row.ours.replace("*", number),
        hugging_face=tuple(name.replace("*", number) for name in row.hugging_face),
        metaseq=row.metaseq.replace("*", number),
        shape=tuple(sizes[word] for word in row.shape),
        cut=row.cut,
        layer=layer,
    )


def fuse_qkv(parts: Sequence[Tensor], head_dim: int) -> Tensor:
    """Interleave query, key and value, each [heads x head size, ...], into [heads x 3 x head size, ...]."""
    # By head, so that the tensor-parallel cut, which knows nothing of q, k and v, cuts between heads.
    by_head = [part.unflatten(0, (-1, head_dim)) for part in parts]
    return torch.stack(by_head, dim=1).flatten(0, 2)


def split_qkv(fused: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`."""
    # Rows are [heads, (q, k, v), head size]: the middle axis is what is taken apart.
    query, key, value = fused.unflatten(0, (-1, 3, head_dim)).unbind(1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def from_metaseq_qkv(part: Tensor, head_dim: int) -> Tensor:
    """One part's projection, whose rows are key, value, query despite its name, in our order."""
    # Thirds, for a part holds as many heads of each.
    key, value, query = part.chunk(3)
    return fuse_qkv((query, key, value), head_dim)


def to_metaseq_qkv(part: Tensor, head_dim: int) -> Tensor:
    """Inverse of `from_metaseq_qkv`."""
    query, key, value = split_qkv(part, head_dim)
    return torch.cat((key, value, query))
