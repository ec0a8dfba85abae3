"""Bias and ReLU of the feed-forward's first projection, in one pass."""

from .op import bias_relu, relu_gradient
from .reference import bias_relu_reference, relu_gradient_reference

__all__ = ["bias_relu", "bias_relu_reference", "relu_gradient", "relu_gradient_reference"]
