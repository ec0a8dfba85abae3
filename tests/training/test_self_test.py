"""The self-test passes on a sound model and names what a broken one does."""

import dataclasses
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
from kernel_cases import torch_varlen
from torch import Tensor

from megatron_iml.data.rows.assemble import Piece, assemble_row
from megatron_iml.kernels.document_attention import (
    DocumentBounds,
    document_attention_reference,
    flash_attention,
)
from megatron_iml.model import build, layer, opt
from megatron_iml.model.ops import REFERENCE
from megatron_iml.training.self_test import BRANCHES, TRUNK, _compare, run_self_test, sample_documents
from megatron_iml.training.trace import Trace

Attention = Callable[..., Tensor]


def attend_with(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build models with this attention."""
    ops = dataclasses.replace(REFERENCE, document_attention=attention)
    monkeypatch.setattr(build, "choose_ops", lambda *unused: ops)


def with_bounds(change: Callable[[Tensor], Tensor]) -> Attention:
    """The reference attention on other bounds than it was given."""

    def attention(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
        return document_attention_reference(qkv, DocumentBounds.from_end(change(bounds.end_T)), **settings)

    return attention


def sees_the_future(qkv: Tensor, bounds: DocumentBounds, softmax_scale: float, **unused: float) -> Tensor:
    """Everything of the same tree, later slots too: a trunk then sees its branches."""
    q, k, v = qkv.permute(2, 1, 0, 3)
    # A tree begins where no earlier slot's end reaches.
    reach_T = torch.cummax(bounds.end_T, 0).values
    begins_T = torch.cat([reach_T.new_zeros(1), reach_T[:-1]]) <= torch.arange(len(reach_T))
    tree_T = begins_T.cumsum(0)
    same = tree_T[:, None] == tree_T[None, :]
    return (torch.softmax((softmax_scale * q @ k.mT).masked_fill(~same, -1e30), -1) @ v).transpose(0, 1)


class LeakyGradient(torch.autograd.Function):
    """Forward is the identity; backward adds a trace of every slot's gradient to every other."""

    @staticmethod
    def forward(ctx: object, qkv: Tensor) -> Tensor:
        return qkv.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient + 1e-3 * gradient.mean(0, keepdim=True)


def leaks_in_the_backward(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
    return document_attention_reference(LeakyGradient.apply(qkv), bounds, **settings)


def test_its_passes_are_in_no_steps_time() -> None:
    with runs.alone(runs.run_config()) as engine:
        run_self_test(engine)
        assert engine.timer.take() == 0.0


BROKEN = {
    "no bounds at all": with_bounds(lambda end: torch.full_like(end, len(end))),
    "every bound one too far": with_bounds(lambda end: (end + 1).clamp(max=len(end))),
    "branches end with their tree": with_bounds(lambda end: end.flip(0).cummax(0).values.flip(0)),
    "sees the future": sees_the_future,
    "leaks in the backward": leaks_in_the_backward,
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_sound_model_passes_and_keeps_its_state(precision: str) -> None:
    with runs.alone(runs.run_config(precision)) as engine:
        before = [parameter.clone() for parameter in engine.chunks[0].parameters()]
        run_self_test(engine)
        assert all(torch.equal(a, b) for a, b in zip(before, engine.chunks[0].parameters(), strict=True))
        assert all((parameter.main_grad == 0).all() for parameter in engine.chunks[0].parameters())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_attention_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attend_with(BROKEN[name], monkeypatch)
    with runs.alone(runs.run_config()) as engine, pytest.raises(RuntimeError) as caught:
        run_self_test(engine)
    message = str(caught.value)
    assert message.startswith("self-test: this layout does not compute what it should\n  ranks [0]: the ")
    assert re.search(r"(losses|embedding gradients) of documents \[.*\] changed with document \d", message)


def test_the_layer_that_leaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers above it only pass the leak on."""
    attend_with(BROKEN["no bounds at all"], monkeypatch)
    with runs.alone(runs.run_config()) as engine:
        for sound in (0, 1, 3):
            engine.chunks[0].decoder.layers[sound].self_attention.ops = REFERENCE
        with pytest.raises(RuntimeError) as caught:
            run_self_test(engine)
    assert "\n  ranks [0]: the attention of layer 2 lets documents see one another\n" in str(caught.value)


def test_the_layer_whose_backward_leaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_with(BROKEN["leaks in the backward"], monkeypatch)
    with runs.alone(runs.run_config()) as engine:
        for sound in (0, 2, 3):
            engine.chunks[0].decoder.layers[sound].self_attention.ops = REFERENCE
        with pytest.raises(RuntimeError) as caught:
            run_self_test(engine)
    assert "\n  ranks [0]: the backward of layer 1's attention mixes documents\n" in str(caught.value)


def embed_at(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Embed at other positions than the row says."""
    forward = opt.OPTEmbedding.forward

    def elsewhere(self: opt.OPTEmbedding, tokens: Tensor, positions: Tensor, keys: Tensor | None) -> Tensor:
        return forward(self, tokens, change(positions), keys)

    monkeypatch.setattr(opt.OPTEmbedding, "forward", elsewhere)


def test_positions_that_do_not_restart_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    embed_at(lambda positions: torch.arange(len(positions)), monkeypatch)
    with runs.alone(runs.run_config()) as engine, pytest.raises(RuntimeError) as caught:
        run_self_test(engine)
    # Units of 4 slots: document 0 takes the first 3, document 1 has 9 tokens and so 8 slots.
    assert "  rank 0: document 1 is at positions 3 to 10, its slots count from 0 to 7" in str(caught.value)
    # A branch counts on from the prefix that it shares.
    assert "document 4 is at positions 24 to 27, its slots count from 4 to 6" not in str(caught.value)
    assert "document 0" not in str(caught.value).partition("rank 0:")[2]


def test_positions_one_off_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    embed_at(lambda positions: positions - 1, monkeypatch)
    with runs.alone(runs.run_config()) as engine, pytest.raises(RuntimeError) as caught:
        run_self_test(engine)
    assert "rank 0: document 0 is at positions -1 to 1, its slots count from 0 to 2" in str(caught.value)


def test_a_layer_that_is_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with runs.alone(runs.run_config()) as engine:
        skipped = engine.chunks[0].decoder.layers[2]
        monkeypatch.setattr(skipped, "forward", lambda hidden_states, **unused: (hidden_states, None))
        with pytest.raises(RuntimeError) as caught:
            run_self_test(engine)
    # Twelve weights a layer.
    assert "  rank 0: no gradient reached decoder.layers.2.input_layernorm.weight and 11 more weights" in str(
        caught.value
    )


def test_a_layer_that_mixes_tokens_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def normalise_over_slots(self: layer.LayerNorm, hidden: Tensor) -> Tensor:
        return (hidden - hidden.mean(0, keepdim=True)) * self.weight + self.bias

    monkeypatch.setattr(layer.LayerNorm, "forward", normalise_over_slots)
    with runs.alone(runs.run_config()) as engine, pytest.raises(RuntimeError, match="losses of documents"):
        run_self_test(engine)


def test_a_model_deaf_to_its_tokens_proves_nothing() -> None:
    with runs.alone(runs.run_config()) as engine:
        engine.chunks[0].embedding.word_embeddings.weight.data.fill_(0.0)
        with pytest.raises(RuntimeError, match="losses of document 1 did not change with its own tokens"):
            run_self_test(engine)


def test_losses_that_are_not_numbers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bad_slot(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
        out = document_attention_reference(qkv, bounds, **settings)
        return out.index_fill(0, torch.tensor([1]), float("nan"))

    attend_with(one_bad_slot, monkeypatch)
    with runs.alone(runs.run_config()) as engine, pytest.raises(RuntimeError, match=r"documents \[0"):
        run_self_test(engine)


def test_an_infinite_loss_counts_as_changed() -> None:
    """It equals itself, whatever the other document held."""
    pieces = [Piece(np.arange(4, 7, dtype=np.int32), 1) for _ in range(2)]
    engine = SimpleNamespace(config=runs.run_config())
    before, after = (Trace(losses_M=torch.tensor([1.0, torch.inf, last, last])) for last in (2.0, 3.0))
    problems = _compare(engine, pieces, before, after, changed=1, may_differ={1})
    assert problems == ["losses of documents [0] changed with document 1"]


def test_flash_attention_is_tested_on_plain_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_with(flash_attention(torch_varlen), monkeypatch)
    config = runs.run_config(attention_backend="flash", attention_dropout=0.0)
    with runs.alone(config) as engine:
        run_self_test(engine)
    # Its varlen function must not be spared the question whether documents mix.
    monkeypatch.undo()
    attend_with(with_bounds(lambda end: torch.full_like(end, len(end))), monkeypatch)
    with runs.alone(config) as engine, pytest.raises(RuntimeError, match="lets documents see one another"):
        run_self_test(engine)


def test_flash_attention_refuses_shared_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_with(flash_attention(torch_varlen), monkeypatch)
    with (
        runs.alone(runs.run_config(attention_dropout=0.0)) as engine,
        pytest.raises(ValueError, match="documents share a prefix"),
    ):
        run_self_test(engine)


@pytest.mark.parametrize(("row_length", "fill"), [(64, 0.4), (2048, 0.4), (16384, 0.3)])
def test_sample_fits_the_row_and_the_position_table(row_length: int, fill: float) -> None:
    pieces = sample_documents(row_length, vocab_size=50272, max_positions=2048)
    row = assemble_row(pieces, row_length, 0)
    assert fill * row_length < row.layout.num_real < row_length
    assert row.layout.positions_T.max() < 2048
    assert all(pieces[branch].trunk == TRUNK for branch in BRANCHES)
    assert np.unique(row.layout.end_T).size > len(pieces)
