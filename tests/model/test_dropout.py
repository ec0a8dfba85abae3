"""Masks are functions of global coordinates: slices agree with the whole, places and rows do not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_iml.kernels.document_attention import document_attention
from megatron_iml.kernels.philox import PLACES, dropout_key
from megatron_iml.model.dropout import EMBEDDING_LAYER, DropoutPlan, key_of
from megatron_iml.model.ops import REFERENCE, choose_ops

PLAN = DropoutPlan(seed=7, hidden=0.1, attention=0.1, embedding=0.1)
KEYS = PLAN.keys(row=3, layers=range(4, 6), device=torch.device("cpu"))
KEY = key_of(KEYS, 0, "attention_output")


def dropout(hidden: torch.Tensor, probability: float, key: torch.Tensor, first_slot: int) -> torch.Tensor:
    return REFERENCE.bias_dropout_add(hidden, None, None, probability, key, first_slot)


def test_keys_are_those_of_the_global_layers() -> None:
    for place in PLACES:
        for index, layer in ((EMBEDDING_LAYER, -1), (0, 4), (1, 5)):
            assert int(key_of(KEYS, index, place)) % 2**64 == dropout_key(7, 3, layer, place)


def test_a_slice_of_slots_draws_its_part_of_the_mask() -> None:
    hidden = torch.randn(24, 1, 33)
    whole = dropout(hidden, 0.3, KEY, first_slot=0)
    for first in (0, 8, 16):
        part = dropout(hidden[first : first + 8], 0.3, KEY, first_slot=first)
        assert torch.equal(part, whole[first : first + 8])
    # Without its place in the row a slice would draw the first slots' mask again.
    assert not torch.equal(dropout(hidden[8:16], 0.3, KEY, first_slot=0), whole[8:16])


def test_kept_elements_are_scaled_and_gradients_follow_the_mask() -> None:
    hidden = torch.ones(200, 1, 200, requires_grad=True)
    out = dropout(hidden, 0.25, KEY, first_slot=0)
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    # 40,000 draws: five standard deviations of their mean.
    assert abs((out == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / 40000) ** 0.5
    out.sum().backward()
    assert torch.equal(hidden.grad, out)


def test_every_row_layer_and_place_has_its_own_mask() -> None:
    hidden = torch.ones(16, 1, 16)
    keys = [*KEYS.flatten(), *PLAN.keys(4, range(4, 6), torch.device("cpu")).flatten()]
    masks = {tuple(dropout(hidden, 0.5, key, 0).flatten().tolist()) for key in keys}
    assert len(masks) == len(keys) == 24


def test_a_plan_without_probabilities_draws_nothing() -> None:
    assert not DropoutPlan(seed=7, hidden=0.0, attention=0.0, embedding=0.0).drops
    assert PLAN.drops


def test_triton_without_a_gpu_is_refused_and_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"got triton on cpu; allowed there: reference"):
        choose_ops("triton", None, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"attention_backend: got flash on cpu; allowed there: reference"):
        choose_ops("reference", "flash", torch.device("cpu"))


def test_attention_can_come_from_elsewhere() -> None:
    # Not torch.device: the CPU adapter, once another test has installed it, turns this one into cpu.
    gpu = SimpleNamespace(type="cuda")
    assert choose_ops("reference", None, gpu) == choose_ops("reference", "reference", gpu) == REFERENCE
    assert choose_ops("reference", "triton", gpu) == replace(REFERENCE, document_attention=document_attention)
