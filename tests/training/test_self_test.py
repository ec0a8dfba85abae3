"""The self-test passes on a sound model and names what a broken one does."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
import pytest
import runs
import torch
from torch import Tensor

from megatron_iml.data.loader import assemble_row
from megatron_iml.kernels.document_attention import DocumentBounds, document_attention_reference
from megatron_iml.model import build, layer
from megatron_iml.model.ops import REFERENCE
from megatron_iml.training.self_test import BRANCHES, TRUNK, run_self_test, sample_documents

Attention = Callable[..., Tensor]


def attend_with(attention: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build models with this attention."""
    ops = dataclasses.replace(REFERENCE, document_attention=attention)
    monkeypatch.setattr(build, "choose_ops", lambda backend, device: ops)


def with_bounds(change: Callable[[Tensor], Tensor]) -> Attention:
    """The reference attention on other bounds than it was given."""

    def attention(qkv: Tensor, bounds: DocumentBounds, **settings: float) -> Tensor:
        return document_attention_reference(qkv, DocumentBounds.from_end(change(bounds.end_T)), **settings)

    return attention


def sees_the_future(qkv: Tensor, bounds: DocumentBounds, softmax_scale: float, **unused: float) -> Tensor:
    """Everything of the same tree, later slots too: a trunk then sees its branches."""
    q, k, v = qkv.permute(2, 1, 0, 3)
    same = bounds.start_T[:, None] == bounds.start_T[None, :]
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
    assert message.startswith("self-test: documents are not isolated on this layout\n  rank 0: ")
    assert re.search(r"(losses|embedding gradients) of documents \[.*\] changed with document \d", message)


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


@pytest.mark.parametrize(("row_length", "fill"), [(64, 0.4), (2048, 0.4), (16384, 0.3)])
def test_sample_fits_the_row_and_the_position_table(row_length: int, fill: float) -> None:
    pieces = sample_documents(row_length, vocab_size=50272, max_positions=2048)
    row = assemble_row(pieces, row_length, 0)
    assert fill * row_length < row.layout.num_real < row_length
    assert row.layout.positions_T.max() < 2048
    assert all(pieces[branch].trunk == TRUNK for branch in BRANCHES)
    assert np.unique(row.layout.end_T).size > len(pieces)
