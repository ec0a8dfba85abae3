"""Useful FLOPs of a row, forward and backward: what the model must compute, not what a program happens to.

    layers       6 x (12 layers hidden^2) x real tokens
    LM head      6 x hidden x vocabulary x targets
    attention    12 x hidden x layers x visible pairs          pairs = sum over col of end[col] - col

Padding, recomputation and masked-out work never count (DESIGN of the numbers: docs/decisions.md).
"""

from megatron_iml.config import ModelConfig


def row_flops(model: ModelConfig, real_tokens: int, targets: int, visible_pairs: int) -> float:
    """FLOPs of one packed row through the whole model, forward and backward."""
    # Query, key, value and output projections, and the two of the feed-forward.
    layer_weights = model.num_layers * model.hidden_size * (4 * model.hidden_size + 2 * model.ffn_hidden_size)
    # A multiply-add is 2, forward once and backward twice, so 6 a weight. A visible pair has two products of
    # hidden length in each layer, q k and p v, hence 12.
    return (
        6.0 * layer_weights * real_tokens
        + 6.0 * model.hidden_size * model.vocab_size * targets
        + 12.0 * model.hidden_size * model.num_layers * visible_pairs
    )
