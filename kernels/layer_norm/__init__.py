"""LayerNorm and what precedes it in a pre-norm layer: bias, dropout and residual addition, in one pass."""

from .op import add_layer_norm, bias_dropout_add, layer_norm, layer_norm_residual
from .reference import (
    add_layer_norm_reference,
    bias_dropout_add_reference,
    layer_norm_reference,
    layer_norm_residual_reference,
)

__all__ = [
    "add_layer_norm",
    "add_layer_norm_reference",
    "bias_dropout_add",
    "bias_dropout_add_reference",
    "layer_norm",
    "layer_norm_reference",
    "layer_norm_residual",
    "layer_norm_residual_reference",
]
