"""Copies of a weight that differ, and weights that nobody holds."""

import pytest
import runs
import torch

from megatron_iml.training.copies import check_copies, check_equal, digest


def test_a_digest_sees_every_change() -> None:
    weight = torch.arange(12, dtype=torch.float32).view(3, 4)
    digests = {digest(weight)}
    for change in (
        weight.flip(0),
        weight.flip(1),
        weight.view(4, 3),
        weight.index_fill(0, torch.tensor([1]), 0.0),
        weight + torch.eye(3, 4) * torch.tensor([5.0, 0.0, 0.0])[:, None],
        weight.roll(1),
        -weight,
        weight.bfloat16(),
    ):
        digests.add(digest(change.contiguous()))
    assert len(digests) == 9
    assert digest(weight) == digest(weight.clone())


def test_a_model_with_a_layer_too_few_is_refused() -> None:
    with runs.alone(runs.run_config()) as engine:
        check_copies(engine)
        del engine.chunks[0].decoder.layers[3]
        with pytest.raises(RuntimeError, match="hold 160,448 parameters, the model has 210,432"):
            check_copies(engine)


def test_the_rank_that_disagrees_with_most_is_named() -> None:
    """TP2 x DP2: rank 1 has other weights. It shares the norm with three ranks, its slice with rank 3."""
    right, wrong = (4, 1, 2), (4, 1, 3)
    holders = {
        ("norm", 0): {0: right, 1: wrong, 2: right, 3: right},
        ("slice", 0): {0: right, 2: right},
        ("slice", 1): {1: wrong, 3: right},
    }
    with pytest.raises(RuntimeError, match=r"ranks \[1\] hold other bits .* in norm and 1 more"):
        check_equal(holders)
    # Of two alone nobody knows which is wrong.
    with pytest.raises(RuntimeError, match=r"ranks \[1, 3\] hold other bits .* in slice and 0 more"):
        check_equal({part: digests for part, digests in holders.items() if part[0] == "slice"})
