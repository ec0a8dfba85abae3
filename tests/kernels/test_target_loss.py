"""target_loss against fp64 within the error budget: repeated rows, chunks, vocabulary shards, scale."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, assert_repeats_equal, normal, on_device
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_iml.kernels.target_loss import target_loss, target_loss_reference
from megatron_iml.kernels.target_loss.op import _chunks
from megatron_iml.kernels.testing import assert_op_within_budget, nan_poison, run_op

pytest.importorskip("triton", reason="triton is not installed")

# slots, features, vocabulary, targets, chunk. One of each; odd everything; several tiles of vocabulary and
# a last chunk that is smaller; several blocks of features to scatter; no targets.
SHAPES = [(1, 1, 2, 1, 1), (9, 17, 37, 11, 4), (6, 33, 5003, 9, 100), (3, 1100, 20, 5, 9), (4, 8, 20, 0, 9)]
GPU_SHAPES = [(2048, 768, 50272, 177, 2048), (16384, 1024, 12568, 1411, 500), (300, 512, 6284, 2500, 2048)]
SHAPES += [pytest.param(*shape, marks=pytest.mark.gpu) for shape in GPU_SHAPES]
# The upstream gradient that a call without `loss_scale` is promised.
ONE = [torch.ones((), device=DEVICE)]


def draw(
    slots: int, features: int, vocab: int, targets: int, dtype: torch.dtype, logit_scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(hidden, weight) and (target rows, target ids): rows in no order, some twice, as in prefix trees."""
    generator = torch.Generator().manual_seed(5)
    differentiable = {
        "hidden_TF": normal(slots, features, seed=1, dtype=dtype),
        "weight_VF": normal(vocab, features, seed=2, dtype=dtype, scale=logit_scale * features**-0.5),
    }
    indices = {
        "target_rows_M": torch.randint(slots, (targets,), generator=generator).to(DEVICE),
        "target_ids_M": torch.randint(vocab, (targets,), generator=generator).to(DEVICE),
    }
    return differentiable, indices


def torch_loss(
    hidden_TF: Tensor, weight_VF: Tensor, target_rows_M: Tensor, target_ids_M: Tensor
) -> tuple[Tensor]:
    """GEMMs in the kernel's type, cross entropy in fp32."""
    logits_MV = hidden_TF.index_select(0, target_rows_M) @ weight_VF.t()
    return (cross_entropy(logits_MV.float(), target_ids_M, reduction="sum"),)


def op(**arguments: Any) -> tuple[Tensor]:
    return (target_loss(**arguments)[0],)


def reference(**arguments: Any) -> tuple[Tensor]:
    return (target_loss_reference(**arguments)[0],)


@pytest.mark.parametrize(("slots", "features", "vocab", "targets", "chunk"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(
    dtype: torch.dtype, slots: int, features: int, vocab: int, targets: int, chunk: int
) -> None:
    differentiable, indices = draw(slots, features, vocab, targets, dtype)
    assert_op_within_budget(
        functools.partial(op, **indices, chunk=chunk),
        functools.partial(torch_loss, **indices),
        functools.partial(reference, **indices),
        differentiable,
        ONE,
    )


# 9 of 8 would leave a chunk of one, which reads and writes the weight's gradient like a full one.
@pytest.mark.parametrize(
    ("targets", "chunk", "sizes"), [(0, 8, []), (8, 8, [8]), (9, 8, [5, 4]), (11, 4, [4, 4, 3])]
)
def test_chunks_are_few_and_equal(targets: int, chunk: int, sizes: list[int]) -> None:
    parts = _chunks(targets, chunk)
    assert [part.stop - part.start for part in parts] == sizes
    assert [slot for part in parts for slot in range(part.start, part.stop)] == list(range(targets))


def test_losses_are_each_target_and_carry_no_gradient() -> None:
    differentiable, indices = draw(9, 17, 37, 11, torch.float32)
    loss_sum, losses_M = target_loss(**differentiable, **indices, chunk=4)
    logits_MV = differentiable["hidden_TF"][indices["target_rows_M"]] @ differentiable["weight_VF"].t()
    expected_M = cross_entropy(logits_MV, indices["target_ids_M"], reduction="none")
    torch.testing.assert_close(losses_M, expected_M.detach())
    torch.testing.assert_close(loss_sum, losses_M.sum())
    assert loss_sum.requires_grad and not losses_M.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_neither_overflow_nor_lose_the_loss(dtype: torch.dtype) -> None:
    # Logits of several hundred, where exp overflows fp32 from 89 on.
    differentiable, indices = draw(9, 16, 300, 11, dtype, logit_scale=300.0)
    assert_op_within_budget(
        functools.partial(op, **indices),
        functools.partial(torch_loss, **indices),
        functools.partial(reference, **indices),
        differentiable,
        ONE,
    )


def reduce_with(
    differentiable: dict[str, Tensor], indices: dict[str, Tensor], shard: slice
) -> dict[str, Callable[[Tensor], Any]]:
    """Reductions of a group of two; plain torch plays the other rank, with what lies outside `shard`."""
    hidden_TF, weight_VF = (tensor.detach().double() for tensor in differentiable.values())
    # fp64, so that the other rank's part adds no error of its own to the comparison.
    rows_M, ids_M = indices.values()
    logits_MV = hidden_TF[rows_M] @ weight_VF.t()
    is_other_V = torch.ones(len(weight_VF), dtype=torch.bool, device=DEVICE)
    is_other_V[shard] = False
    maximum_M = logits_MV.amax(dim=1)
    others_MV = torch.exp(logits_MV - maximum_M[:, None]) * is_other_V
    targets_M = logits_MV.gather(1, ids_M[:, None]).squeeze(1) * is_other_V[ids_M]
    sum_and_target = torch.stack([others_MV.sum(dim=1), targets_M])
    return {
        "group_max": lambda tensor: tensor.copy_(torch.maximum(tensor, maximum_M.to(tensor.dtype))),
        "group_sum": lambda tensor: tensor.add_(sum_and_target.to(tensor.dtype)),
    }


@pytest.mark.parametrize("function", [target_loss, target_loss_reference])
# The last one has two blocks of columns in the kernel that turns a shard's logits into their gradient.
@pytest.mark.parametrize(
    ("vocab", "shard"), [(37, slice(0, 20)), (37, slice(20, 37)), (16500, slice(0, 8250))]
)
def test_a_shard_of_the_vocabulary_computes_its_part_of_the_whole(
    function: Callable[..., tuple[Tensor, Tensor]], vocab: int, shard: slice
) -> None:
    """Both shards must see targets that are theirs and targets that are not."""
    differentiable, indices = draw(9, 17, vocab, 11, torch.float32)
    whole = run_op(functools.partial(reference, **indices), differentiable, ONE)
    reductions = reduce_with(differentiable, indices, shard)
    weight_VF = differentiable["weight_VF"].detach()[shard].clone().requires_grad_()
    hidden_TF = differentiable["hidden_TF"]
    loss_sum, _ = function(hidden_TF, weight_VF, **indices, vocab_start=shard.start, **reductions)
    d_hidden_TF, d_weight_VF = torch.autograd.grad(loss_sum, (hidden_TF, weight_VF))
    torch.testing.assert_close(loss_sum.detach(), whole["output 0"])
    torch.testing.assert_close(d_weight_VF, whole["gradient of weight_VF"][shard])
    # The hidden gradient is this shard's part: with the other's it makes the whole.
    other = slice(shard.stop, vocab) if shard.start == 0 else slice(0, shard.start)
    rest_VF = differentiable["weight_VF"].detach()[other].clone()
    reductions = reduce_with(differentiable, indices, other)
    rest_sum, _ = function(hidden_TF, rest_VF, **indices, vocab_start=other.start, **reductions)
    (d_rest_TF,) = torch.autograd.grad(rest_sum, hidden_TF)
    torch.testing.assert_close(d_hidden_TF + d_rest_TF, whole["gradient of hidden_TF"])


@pytest.mark.parametrize("function", [target_loss, target_loss_reference])
def test_the_weights_gradient_goes_into_its_buffer_scaled(
    function: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    differentiable, indices = draw(9, 17, 37, 11, torch.float32)
    whole = run_op(functools.partial(reference, **indices), differentiable, ONE)
    before_VF = torch.full((37, 17), 0.5, device=DEVICE)
    buffer_VF, scale = before_VF.clone(), torch.tensor(8.0, device=DEVICE)
    loss_sum, _ = function(**differentiable, **indices, loss_scale=scale, weight_grad_VF=buffer_VF, chunk=4)
    # The contract: what reaches the sum in the backward is the scale that the forward was told.
    (loss_sum * scale).backward()
    assert differentiable["weight_VF"].grad is None
    torch.testing.assert_close(buffer_VF, before_VF + 8.0 * whole["gradient of weight_VF"])
    torch.testing.assert_close(differentiable["hidden_TF"].grad, 8.0 * whole["gradient of hidden_TF"])


def test_scaling_before_rounding_saves_small_fp16_gradients() -> None:
    """Most of these probabilities lie below fp16's smallest number; scaled by 2^15 few do."""
    differentiable, indices = draw(1, 64, 2000, 1, torch.float16, logit_scale=5.0)
    lost = {}
    for scale in (1.0, 32768.0):
        buffer_VF = torch.zeros(2000, 64, device=DEVICE)
        loss_scale = torch.tensor(scale, device=DEVICE)
        target_loss(**differentiable, **indices, loss_scale=loss_scale, weight_grad_VF=buffer_VF)
        assert buffer_VF.isfinite().all()
        lost[scale] = float((~buffer_VF.any(dim=1)).float().mean())
    # Rows of the vocabulary without any gradient: with one target each has only its probability's.
    assert lost[1.0] > 0.6 and lost[32768.0] < 0.3, lost


def test_without_gradients_nothing_is_accumulated() -> None:
    differentiable, indices = draw(9, 17, 37, 11, torch.float32)
    buffer_VF = torch.zeros(37, 17, device=DEVICE)
    with torch.no_grad():
        loss_sum, losses_M = target_loss(**differentiable, **indices, weight_grad_VF=buffer_VF)
    assert not buffer_VF.any() and not loss_sum.requires_grad
    torch.testing.assert_close(losses_M, target_loss(**differentiable, **indices)[1])
    # A frozen weight: gradients flow through the head, and none into it.
    frozen = differentiable | {"weight_VF": differentiable["weight_VF"].detach()}
    target_loss(**frozen, **indices, weight_grad_VF=buffer_VF)[0].backward()
    assert not buffer_VF.any() and differentiable["hidden_TF"].grad.any()


def test_a_nan_reaches_only_its_own_targets() -> None:
    differentiable, indices = draw(9, 17, 37, 11, torch.float32)
    _, clean_M = target_loss(**differentiable, **indices, chunk=4)
    with torch.no_grad():
        differentiable["hidden_TF"][int(indices["target_rows_M"][0]), 3] = float("nan")
    # Poisoned, since a chunk that read another's logits would meet what that left in the buffer.
    with nan_poison():
        _, losses_M = target_loss(**differentiable, **indices, chunk=4)
    is_spoilt_M = indices["target_rows_M"] == indices["target_rows_M"][0]
    assert losses_M[is_spoilt_M].isnan().all()
    assert torch.equal(losses_M[~is_spoilt_M], clean_M[~is_spoilt_M])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    shape, repeats = ((512, 256, 5001, 900), 50) if DEVICE.type == "cuda" else ((5, 16, 50, 20), 2)
    differentiable, indices = draw(*shape, dtype)
    assert_repeats_equal(functools.partial(op, **indices), differentiable, ONE, repeats)


@pytest.mark.parametrize(
    ("change", "first_line"),
    [
        ({"weight_VF": torch.zeros(37, 16)}, r"weight is \(37, 16\).* must be \(37, 17\)"),
        ({"target_ids_M": torch.zeros(10, dtype=torch.int64)}, r"target_ids is \(10,\).* must be \(11,\)"),
        ({"target_rows_M": torch.zeros(11, dtype=torch.int32)}, r"target_rows is .*int32.* must be .*int64"),
        ({"hidden_TF": torch.zeros(9, 1, 17)}, r"hidden is \(9, 1, 17\).*view them"),
        ({"weight_grad_VF": torch.zeros(37, 17).half()}, r"weight_grad is .*float16.* must be .*float32"),
        ({"chunk": 0}, r"chunk is 0; allowed: 1 or more"),
        ({"group_max": abs}, r"group_sum is None; allowed: both or neither"),
        ({"group_sum": abs}, r"group_max is None; allowed: both or neither"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict, first_line: str) -> None:
    differentiable, indices = draw(9, 17, 37, 11, torch.float32)
    change = {name: on_device(value) for name, value in change.items()}
    with pytest.raises(ValueError, match=first_line):
        target_loss(**(differentiable | indices | change))


def test_reference_adds_a_low_precision_gradient_to_an_fp32_buffer() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator)
    rows, ids = torch.tensor([1, 1, 4]), torch.tensor([0, 10, 3])
    buffers = []
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.full((11, 8), 0.5)
        # Detached, or in bf16 it would be no leaf, and its .grad None whatever happened.
        leaf = weight.detach().to(dtype).requires_grad_()
        loss_sum, _ = target_loss_reference(hidden.to(dtype), leaf, rows, ids, weight_grad_VF=buffer)
        loss_sum.backward()
        assert leaf.grad is None
        buffers.append(buffer)
    # Inputs and gradient are rounded to 8 bits.
    torch.testing.assert_close(buffers[1], buffers[0], rtol=0.05, atol=0.05)
    assert not torch.equal(buffers[0], torch.full((11, 8), 0.5))
