"""Names of OPT's tensors here and in Hugging Face's format: one table, read in both directions.

A `*` stands for the layer's number. Most tensors carry over as they are; the fused projection is the one
rule: here each head's query, key and value rows lie side by side (a tensor-parallel slice is whole heads),
there they are three matrices.

    decoder.layers.7.mlp.linear_fc1.weight                 <->  decoder.layers.7.fc1.weight
    decoder.layers.7.self_attention.linear_qkv.weight      <->  decoder.layers.7.self_attn.{q,k,v}_proj.weight
"""

from collections.abc import Sequence

import torch
from torch import Tensor

HUGGING_FACE_NAMES: dict[str, tuple[str, ...]] = {
    "embedding.word_embeddings.weight": ("decoder.embed_tokens.weight",),
    "embedding.position_embeddings.weight": ("decoder.embed_positions.weight",),
    "decoder.final_layernorm.weight": ("decoder.final_layer_norm.weight",),
    "decoder.final_layernorm.bias": ("decoder.final_layer_norm.bias",),
    "decoder.layers.*.input_layernorm.weight": ("decoder.layers.*.self_attn_layer_norm.weight",),
    "decoder.layers.*.input_layernorm.bias": ("decoder.layers.*.self_attn_layer_norm.bias",),
    "decoder.layers.*.self_attention.linear_qkv.weight": tuple(
        f"decoder.layers.*.self_attn.{part}_proj.weight" for part in "qkv"
    ),
    "decoder.layers.*.self_attention.linear_qkv.bias": tuple(
        f"decoder.layers.*.self_attn.{part}_proj.bias" for part in "qkv"
    ),
    "decoder.layers.*.self_attention.linear_proj.weight": ("decoder.layers.*.self_attn.out_proj.weight",),
    "decoder.layers.*.self_attention.linear_proj.bias": ("decoder.layers.*.self_attn.out_proj.bias",),
    # OPT calls the norm before its feed-forward final_layer_norm, in every layer.
    "decoder.layers.*.pre_mlp_layernorm.weight": ("decoder.layers.*.final_layer_norm.weight",),
    "decoder.layers.*.pre_mlp_layernorm.bias": ("decoder.layers.*.final_layer_norm.bias",),
    "decoder.layers.*.mlp.linear_fc1.weight": ("decoder.layers.*.fc1.weight",),
    "decoder.layers.*.mlp.linear_fc1.bias": ("decoder.layers.*.fc1.bias",),
    "decoder.layers.*.mlp.linear_fc2.weight": ("decoder.layers.*.fc2.weight",),
    "decoder.layers.*.mlp.linear_fc2.bias": ("decoder.layers.*.fc2.bias",),
}


def hugging_face_names(name: str) -> tuple[str, ...]:
    """The tensors that one of ours is made of: one, or query, key and value.

    Raises:
        KeyError: if the table has no such parameter.
    """
    parts = name.split(".")
    layer = parts[2] if name.startswith("decoder.layers.") else ""
    pattern = ".".join([*parts[:2], "*", *parts[3:]]) if layer else name
    return tuple(theirs.replace("*", layer) for theirs in HUGGING_FACE_NAMES[pattern])


def fuse_qkv(parts: Sequence[Tensor], head_dim: int) -> Tensor:
    """Interleave query, key and value, each [heads x head size, ...], into [heads x 3 x head size, ...]."""
    # By head, so that the tensor-parallel cut, which knows nothing of q, k and v, cuts between heads.
    by_head = [part.unflatten(0, (-1, head_dim)) for part in parts]
    return torch.stack(by_head, dim=1).flatten(0, 2)


def split_qkv(fused: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `fuse_qkv`."""
    query, key, value = fused.unflatten(0, (-1, 3, head_dim)).unbind(1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
