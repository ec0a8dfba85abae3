"""Useful FLOPs, worked by hand."""

from helpers import tiny_config

from megatron_iml.training.flops import row_flops

MODEL = tiny_config(num_layers=3, hidden_size=4, ffn_hidden_size=16, vocab_size=10).model


def test_by_hand() -> None:
    # A layer: qkv 4 x 12, projection 4 x 4, fc1 4 x 16, fc2 16 x 4 = 192 weights, 6 FLOPs each a token.
    assert row_flops(MODEL, real_tokens=1, targets=0, visible_pairs=0) == 6 * 3 * 192
    # The head: a row of 10 products of 4, for targets only.
    assert row_flops(MODEL, real_tokens=0, targets=1, visible_pairs=0) == 6 * 4 * 10
    # A pair: score and value, 2 x 2 x 4 FLOPs forward, twice that backward, in 3 layers.
    assert row_flops(MODEL, real_tokens=0, targets=0, visible_pairs=1) == 3 * (2 * 2 * 4) * 3
    assert row_flops(MODEL, 7, 5, 3) == 7 * 6 * 3 * 192 + 5 * 240 + 3 * 144


def test_it_is_six_times_the_weights_of_a_real_size() -> None:
    model = tiny_config(num_layers=12, hidden_size=768, ffn_hidden_size=3072).model
    assert row_flops(model, 1000, 0, 0) == 6 * 12 * 12 * 768**2 * 1000
