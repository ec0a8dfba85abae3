"""Our OPT and `transformers`' OPT: the same logits-derived losses and the same gradients, in fp32.

One document per Hugging Face batch row, never Hugging Face packing, is the oracle.
"""

import numpy as np
import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.checkpoint.conversion.parameter_map import fuse_qkv, parameters
from megatron_iml.checkpoint.weights import fill_from_source
from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.model.build import build_model
from megatron_iml.model.parameters import named_global_parameters
from megatron_iml.model.row import to_device

transformers = pytest.importorskip("transformers")

SHAPES = {"head64": (2, 128, 2), "head80": (3, 160, 2), "head128": (1, 256, 2), "deep": (6, 64, 4)}


def hugging_face_opt(layers: int, hidden: int, heads: int, folder):
    config = transformers.OPTConfig(
        vocab_size=88,
        hidden_size=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=heads,
        max_position_embeddings=64,
        word_embed_proj_dim=hidden,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        init_std=0.1,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    with torch.no_grad():
        # Hugging Face starts biases at 0 and norms at 1: random ones would show a swapped pair.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_losses_and_gradients_match_transformers(shape, tmp_path):
    layers, hidden, heads = shape
    theirs = hugging_face_opt(layers, hidden, heads, tmp_path)
    config = tiny_config(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, vocab_size=88)
    rng = np.random.default_rng(1)
    documents = [
        (rng.integers(4, 88, length), source) for length, source in ((9, 4), (2, 1), (30, 20), (17, 0))
    ]
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        fill_from_source(tmp_path, chunks, config.model, layout)
        ours = chunks[0].train()
        row = assemble_row(
            [Piece(tokens.astype(np.int32), source) for tokens, source in documents], 64, index=0
        )
        total, losses = ours(to_device(row, layout.device))
        total.backward()
        gradients = {name: parameter.grad for name, parameter in named_global_parameters(chunks)}

    expected = []
    for tokens, source in documents:
        ids = torch.from_numpy(tokens)[None]
        logits = theirs(ids[:, :-1]).logits[0]
        first = max(source, 1)
        expected.append(
            torch.nn.functional.cross_entropy(logits[first - 1 :], ids[0, first:], reduction="none")
        )
    expected_losses = torch.cat(expected)
    expected_losses.sum().backward()
    torch.testing.assert_close(losses, expected_losses, rtol=2e-5, atol=2e-5)
    reference = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, gradient in gradients.items():
        parts = [reference[part] for part in parameters(config.model)[name].hugging_face]
        truth = fuse_qkv(parts, hidden // heads) if len(parts) == 3 else parts[0]
        error = (gradient - truth).abs().max() / truth.abs().max().clamp_min(1e-6)
        # The key bias cannot change a softmax: its gradient is rounding noise, so the scale is the whole
        # tensor's.
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
