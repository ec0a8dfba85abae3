"""Greedy decoding with the cache equals reading the whole text again for every token."""

import numpy as np
import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.model import build
from megatron_iml.model.build import build_model
from megatron_iml.model.inference import InferenceModel
from megatron_iml.model.initialise import initialise
from megatron_iml.model.ops import REFERENCE, TRITON


def losses_of_all_tokens(model: InferenceModel, tokens: np.ndarray) -> np.ndarray:
    return model.target_losses(assemble_row([Piece(tokens, 0)], len(tokens) - 1, index=0))


def test_cached_decoding_equals_reading_everything_again():
    config = tiny_config(init_method_std=0.2)
    prompts = [np.array([5, 9, 11]), np.array([7]), np.array([40, 41, 42, 43, 44, 45])]
    with single_rank(config) as layout, torch.no_grad():
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 1, layout)
        model = InferenceModel(chunks[0], layout, vocab_entries=90, max_positions=64)
        cache, tokens = model.prefill(prompts, max_new_tokens=4)
        generated = [tokens]
        for _ in range(2):
            generated.append(model.decode(cache, generated[-1]))
        cache.keep(np.array([0, 2]))
        generated.append(model.decode(cache, generated[-1][[0, 2]]))
        # The token that decoding chose has the smallest loss of all continuations of the same text.
        sequences = [np.concatenate([p, [g[i] for g in generated[:3]]]) for i, p in enumerate(prompts)]
        for i, sequence in enumerate(sequences):
            for step in range(3):
                length = len(prompts[i]) + step
                losses = [losses_of_all_tokens(model, np.append(sequence[:length], t))[-1] for t in range(90)]
                assert int(np.argmin(losses)) == sequence[length], f"prompt {i}, step {step}"
        last = np.argmin([losses_of_all_tokens(model, np.append(sequences[2], t))[-1] for t in range(90)])
        assert generated[3][1] == last


def test_rows_that_pad_the_vocabulary_are_never_generated():
    config = tiny_config(init_method_std=0.2)
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 1, layout)
        # One of the two has the largest logit by far, whatever the hidden state.
        words = chunks[0].embedding.word_embeddings.weight.data
        words[94], words[95] = 1e4 * words[7], -1e4 * words[7]
        chosen = {}
        for entries in (94, 96):
            model = InferenceModel(chunks[0], layout, vocab_entries=entries, max_positions=64)
            cache, tokens = model.prefill([np.array([5, 9, 11]), np.array([7])], max_new_tokens=2)
            chosen[entries] = [*tokens.tolist(), *model.decode(cache, np.array([8, 12])).tolist()]
    assert all(token < 94 for token in chosen[94])
    assert all(token >= 94 for token in chosen[96])


def test_losses_of_one_text_are_a_distribution():
    config = tiny_config(init_method_std=0.2)
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        initialise(chunks, config.model, 1, layout)
        model = InferenceModel(chunks[0], layout, vocab_entries=96, max_positions=64)
        losses = [losses_of_all_tokens(model, np.array([5, 9, t]))[-1] for t in range(96)]
    assert abs(np.exp(-np.array(losses, dtype=np.float64)).sum() - 1.0) < 1e-5


def test_the_kernels_generate_and_score_as_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    config = tiny_config(init_method_std=0.2)
    prompts = [np.array([5, 9, 11]), np.array([7]), np.array([40, 41, 42, 43, 44, 45])]
    results = []
    for ops in (REFERENCE, TRITON):
        # The trainer refuses these kernels on a CPU, since the interpreter is for tests.
        monkeypatch.setattr(build, "choose_ops", lambda *unused, ops=ops: ops)
        with single_rank(config) as layout:
            chunks = build_model(config, layout)
            initialise(chunks, config.model, 1, layout)
            model = InferenceModel(chunks[0], layout, vocab_entries=90, max_positions=64)
            cache, tokens = model.prefill(prompts, max_new_tokens=3)
            generated = [tokens, model.decode(cache, tokens)]
            cache.keep(np.array([0, 2]))
            generated.append(model.decode(cache, generated[-1][[0, 2]]))
            losses = losses_of_all_tokens(model, np.arange(5, 35))
        results.append((np.concatenate(generated).tolist(), losses))
    (tokens, losses), (kernel_tokens, kernel_losses) = results
    assert kernel_tokens == tokens
    # fp32, in another order of sums.
    np.testing.assert_allclose(kernel_losses, losses, rtol=1e-5, atol=1e-5)
