"""Masks are functions of global coordinates: slices agree with the whole, places and rows do not."""

import pytest
import torch

from megatron_iml.model.dropout import DropoutPlan, dropout

PLAN = DropoutPlan(seed=7, hidden=0.1, attention=0.1, embedding=0.1)
KEY = PLAN.key(row=3, layer=1, place="attention_output")


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
    keys = [KEY, PLAN.key(4, 1, "attention_output"), PLAN.key(3, 2, "attention_output")]
    keys += [PLAN.key(3, 1, place) for place in ("attention", "embedding", "feed_forward_output")]
    masks = {tuple(dropout(hidden, 0.5, key, 0).flatten().tolist()) for key in keys}
    assert len(masks) == len(keys)


def test_no_dropout_is_no_operation() -> None:
    hidden = torch.randn(2, 1, 3)
    assert dropout(hidden, 0.0, KEY, 0) is hidden
