"""The grouped norm against arithmetic by hand, and that megatron-core takes it."""

import math

import pytest
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from megatron_iml.training.multi_tensor import l2_norm, offer_l2_norm

FLAG = torch.zeros(1, dtype=torch.int)


def test_the_norm_is_over_all_tensors() -> None:
    norm, per_tensor = l2_norm(1, FLAG, [[torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])]], False)
    assert (norm.tolist(), norm.dtype, per_tensor) == ([13.0], torch.float32, None)


def test_megatron_core_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    offer_l2_norm()
    assert clip_grads.l2_norm_impl is l2_norm


def test_apex_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def apex() -> None: ...

    monkeypatch.setattr(clip_grads, "l2_norm_impl", apex)
    offer_l2_norm()
    assert clip_grads.l2_norm_impl is apex


def test_the_norm_agrees_with_fp64() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=generator) for n in (1, 7, 1000, 4096)]
    truth = math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors))
    assert float(l2_norm(1, FLAG, [tensors], False)[0]) == pytest.approx(truth, rel=1e-6)
