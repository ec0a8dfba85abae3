"""The reference attention against the formula with a whole mask matrix, in fp64, on random forests.

Tolerance, forward: twice the error that the same formula makes when torch computes it in the input's type
(gradients three times), plus a floor of one rounding of the largest value. The reference computes in fp32 or
better, so it stays far inside; a column too many or too few is an error of order 1.
"""

import pytest
import torch
from forests import random_end
from torch import Tensor

from megatron_iml.kernels.document_attention import DocumentBounds, document_attention_reference
from megatron_iml.kernels.philox import keep_mask

HEADS, HEAD_DIM, SCALE = 3, 8, 8**-0.5


def visible(end_T: Tensor) -> Tensor:
    """The formula: row sees col if and only if col <= row < end[col]."""
    index_T = torch.arange(end_T.numel())
    return (index_T[None, :] <= index_T[:, None]) & (index_T[:, None] < end_T[None, :])


def dense_attention(qkv_TH3D: Tensor, end_T: Tensor, dropout: float = 0.0, key: int = 0) -> Tensor:
    """Masked softmax over the whole row, in the input's type."""
    q, k, v = qkv_TH3D.permute(2, 1, 0, 3)
    sees_TT = visible(end_T)
    scores = (SCALE * q @ k.transpose(1, 2)).masked_fill(~sees_TT, float("-inf"))
    # Rows that see nothing would be 0 / 0.
    probabilities = torch.softmax(scores.masked_fill(~sees_TT.any(1)[:, None], 0.0), -1) * sees_TT
    if dropout:
        index_T = torch.arange(end_T.numel())
        keep = keep_mask(key, dropout, index_T, index_T, torch.arange(q.shape[0]))
        probabilities = probabilities * keep / (1 - dropout)
    return (probabilities @ v).transpose(0, 1)


def random_qkv(end_T: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(end_T.numel(), HEADS, 3, HEAD_DIM, generator=generator, dtype=torch.float64)
    # Doubled, so that softmaxes are far from uniform and a wrong column shows.
    return (2 * qkv).to(dtype)


def attend(qkv: Tensor, end_T: Tensor, **dropout: float) -> Tensor:
    return document_attention_reference(qkv, DocumentBounds.from_end(end_T), SCALE, **dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_random_forests_in_fp64(dropout: float) -> None:
    for seed in range(200):
        end_T = random_end(seed)
        ours = random_qkv(end_T, seed).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        out = attend(ours, end_T, dropout_probability=dropout, dropout_key=seed)
        truth = dense_attention(theirs, end_T, dropout, seed)
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12, msg=lambda m, s=seed: f"seed {s}: {m}")
        # A gradient of ones would hide much: probabilities of a row add up to 1.
        weight = torch.randn_like(out)
        (out * weight).sum().backward()
        (truth * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_in_lower_precision(dtype: torch.dtype) -> None:
    for seed in range(40):
        end_T = random_end(seed, max_slots=120)
        qkv = random_qkv(end_T, seed, dtype)
        ours, same_type, exact = (
            qkv.detach().clone().to(d).requires_grad_() for d in (dtype, dtype, torch.float64)
        )
        out, plain, truth = (
            attend(ours, end_T),
            dense_attention(same_type, end_T),
            dense_attention(exact, end_T),
        )
        assert out.dtype == dtype
        rounding = torch.finfo(dtype).eps
        allowed = 2 * error(plain, truth) + rounding * truth.abs().max()
        assert error(out, truth) <= allowed, f"seed {seed}"
        for output in (out, plain, truth):
            output.double().square().sum().backward()
        assert exact.grad is not None
        allowed = 3 * error(same_type.grad, exact.grad) + rounding * exact.grad.abs().max()
        assert error(ours.grad, exact.grad) <= allowed, f"gradient, seed {seed}"


def error(value: Tensor | None, truth: Tensor) -> Tensor:
    assert value is not None
    return (value.double() - truth).abs().max()


def test_rows_that_see_nothing_are_zero() -> None:
    end_T = torch.tensor([0, 3, 3, 3, 4, 7, 7, 7], dtype=torch.int32)
    qkv = random_qkv(end_T, 0).requires_grad_()
    out = attend(qkv, end_T)
    # Padding at the start, between documents (two slots) and behind them.
    blind = ~visible(end_T).any(1)
    assert blind.tolist() == [True, False, False, True, True, False, False, True]
    assert (out[blind] == 0).all() and (out[~blind] != 0).any(-1).all()
    out.sum().backward()
    assert (qkv.grad[blind] == 0).all(), "padding has no gradient"


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e30])
def test_poison_in_one_document_reaches_no_other(poison: float) -> None:
    end_T = torch.tensor([4, 4, 4, 4, 9, 9, 9, 7, 9, 10, 13, 13, 13, 13], dtype=torch.int32)
    clean = random_qkv(end_T, 1, torch.float32).requires_grad_()
    out = attend(clean, end_T, dropout_probability=0.1)
    out.sum().backward()
    # The tree in the middle and the tail of padding carry the poison.
    poisoned = list(range(4, 9)) + [13]
    others = [slot for slot in range(14) if slot not in poisoned]
    dirty = clean.detach().clone()
    dirty[poisoned] = poison
    dirty.requires_grad_()
    after = attend(dirty, end_T, dropout_probability=0.1)
    after[others].sum().backward()
    # Bits: the columns of other documents are never read, in either direction.
    assert torch.equal(after[others], out[others])
    assert torch.equal(dirty.grad[others], clean.grad[others])


def test_a_branch_reaches_neither_its_trunk_nor_its_sibling() -> None:
    # Trunk 0-2 of which 0 and 1 are shared, branches 3-5 and 6-7.
    end_T = torch.tensor([8, 8, 3, 6, 6, 6, 8, 8], dtype=torch.int32)
    # Slot 2 is the trunk's own tail, which no branch sees.
    before = random_qkv(end_T, 2, torch.float32)
    after = before.clone()
    after[3:6] = 100 * torch.randn(3, HEADS, 3, HEAD_DIM)
    changed = (attend(before, end_T) != attend(after, end_T)).flatten(1).any(1)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_a_slice_of_heads_draws_its_own_masks() -> None:
    end_T = random_end(3)
    qkv = random_qkv(end_T, 3)
    dropout = {"dropout_probability": 0.4, "dropout_key": 77}
    whole = attend(qkv, end_T, **dropout)
    for first in range(HEADS):
        # As a tensor-parallel rank does with its heads.
        part = attend(qkv[:, first : first + 1], end_T, **dropout, first_head=first)
        torch.testing.assert_close(part, whole[:, first : first + 1], rtol=1e-13, atol=1e-13)
    assert not torch.allclose(whole, attend(qkv, end_T, dropout_probability=0.4, dropout_key=78))


def test_dropout_keeps_the_expectation() -> None:
    end_T = torch.full((24,), 24, dtype=torch.int32)
    qkv = random_qkv(end_T, 4)
    draws = torch.stack([attend(qkv, end_T, dropout_probability=0.2, dropout_key=k) for k in range(2000)])
    deviation = (draws.mean(0) - attend(qkv, end_T)) / (draws.std(0) / 2000**0.5).clamp_min(1e-12)
    # 576 means of 2,000 draws each: six standard errors.
    assert deviation.abs().max() < 6


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_short_rows(slots: int) -> None:
    end_T = torch.arange(1, slots + 1, dtype=torch.int32)
    qkv = random_qkv(end_T, 5)
    # A document of one slot sees itself alone: the output is its value, whatever the scores.
    torch.testing.assert_close(attend(qkv, end_T), qkv[:, :, 2], rtol=0, atol=1e-15)
