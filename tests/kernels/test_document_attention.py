"""The Triton kernels against fp64 within the error budget, on forests; strides, repeats, masks.

Sizes: one slot, one less and one more than a tile of 64, documents of one slot, one document over several
tiles, nothing but padding, forests whose trunks and branches cut tiles anywhere. Documents of one slot alone
have a test of their own: there plain torch is exact, since its softmax is 1, so twice its error is no budget.
"""

import functools

import pytest
import torch
from attention_cases import ENDS, FIRST_HEAD, KEY, attend, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, assert_repeats_equal, normal
from torch import Tensor

from megatron_iml.kernels.document_attention import (
    DocumentBounds,
    document_attention,
    document_attention_reference,
)
from megatron_iml.kernels.document_attention.bounds import LONG_DOCUMENTS
from megatron_iml.kernels.philox import keep_mask, key_tensor
from megatron_iml.kernels.testing import (
    assert_op_within_budget,
    documents_end,
    max_error,
    nan_poison,
    random_forest_end,
    run_op,
)

pytest.importorskip("triton", reason="triton is not installed")


def keep(tokens: int, heads: int, probability: float) -> Tensor:
    index_T = torch.arange(tokens, device=DEVICE)
    planes_H = torch.arange(FIRST_HEAD, FIRST_HEAD + heads, device=DEVICE)
    return keep_mask(KEY, probability, index_T, index_T, planes_H)


def dense_attention(end_T: Tensor, probability: float, qkv: Tensor) -> tuple[Tensor]:
    """What a model without kernels computes: a mask over the whole row, each step rounded to the type."""
    q, k, v = qkv.permute(2, 1, 0, 3)
    sees_TT = visible(end_T)
    scores = (q @ k.transpose(1, 2) * qkv.shape[3] ** -0.5).masked_fill(~sees_TT, float("-inf"))
    probabilities = torch.softmax(scores.masked_fill(~sees_TT.any(1)[:, None], 0.0), -1) * sees_TT
    if probability > 0.0:
        probabilities = probabilities * keep(end_T.numel(), q.shape[0], probability) / (1.0 - probability)
    return ((probabilities @ v).transpose(0, 1),)


def hold_to_budget(
    end_T: Tensor,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    probability: float = 0.0,
    seed: int = 1,
    pairs: int | None = None,
) -> None:
    end_T, tokens = end_T.to(DEVICE), end_T.numel()
    reference = functools.partial(attend, end_T, probability, op=document_attention_reference)
    assert_op_within_budget(
        functools.partial(attend, end_T, probability, pairs=pairs),
        functools.partial(dense_attention, end_T, probability),
        reference,
        {"qkv": normal(tokens, heads, 3, head_dim, seed=seed, dtype=dtype)},
        [normal(tokens, heads, head_dim, seed=seed + 1, dtype=dtype).detach()],
    )


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_budget(dtype: torch.dtype, name: str) -> None:
    hold_to_budget(ENDS[name], 2, 16, dtype)


# Wide heads without dropout: the forward's query tiles have 128 rows.
@pytest.mark.parametrize(("head_dim", "probability"), [(16, 0.1), (128, 0.0)])
@pytest.mark.parametrize("name", ["one document over three tiles", "trunk and branches", "forest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_the_budget_with_wide_tiles(
    dtype: torch.dtype, name: str, head_dim: int, probability: float
) -> None:
    # So many pairs that the row counts as one of long documents.
    hold_to_budget(ENDS[name], 2, head_dim, dtype, probability, pairs=LONG_DOCUMENTS * 1000)


def test_a_document_of_one_slot_is_its_value() -> None:
    qkv = normal(1, 2, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(1, 2, 16, seed=2, dtype=torch.float32).detach()
    with nan_poison():
        found = run_op(
            functools.partial(attend, documents_end([1]).to(DEVICE), 0.0), {"qkv": qkv}, [gradient]
        )
    # A few roundings of sums of 16 products of order 1.
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=4e-6)
    close(found["output 0"], qkv[:, :, 2])
    close(found["gradient of qkv"][:, :, 2], gradient)
    close(found["gradient of qkv"][:, :, :2], torch.zeros_like(qkv[:, :, :2]))


def test_scores_far_below_zero_are_scores() -> None:
    # The running maximum begins at a finite number, which has to lie below anything that a model computes.
    qkv = normal(1, 1, 3, 16, seed=1, dtype=torch.float32).detach()
    qkv[0, 0, 0], qkv[0, 0, 1] = 200.0, -100.0
    out = document_attention(qkv, DocumentBounds.from_end(documents_end([1]).to(DEVICE)), 1.0)
    torch.testing.assert_close(out, qkv[:, :, 2])


# Below the smallest tile, filled up to 16; a tile's own; filled up to 128; the largest. From 80 on the
# forward masks every tile.
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes(dtype: torch.dtype, head_dim: int) -> None:
    hold_to_budget(ENDS["forest of short trees"], 1, head_dim, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    # Were one element's mask another than the definition's, the error would be of order 1.
    hold_to_budget(ENDS["forest"], 2, 16, dtype, probability=0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("probability", [0.0, 0.1])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_real_sizes(dtype: torch.dtype, head_dim: int, probability: float) -> None:
    for seed, pairs in enumerate([None, LONG_DOCUMENTS * 10000, None]):
        end_T = random_forest_end(seed, 3001, 2048)
        hold_to_budget(end_T, 3, head_dim, dtype, probability, seed, pairs)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 200), longest=st.integers(1, 100))
def test_random_forests(seed: int, tokens: int, longest: int) -> None:
    hold_to_budget(random_forest_end(seed, tokens, longest), 1, 16, torch.float16, seed=seed % 1000)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 5000), longest=st.integers(1, 2048))
def test_random_forests_of_real_lengths(seed: int, tokens: int, longest: int) -> None:
    hold_to_budget(random_forest_end(seed, tokens, longest), 2, 64, torch.bfloat16, seed=seed % 1000)


def test_the_mask_is_the_definitions_bit_for_bit() -> None:
    # Uniform attention over one document, values the unit vectors: the output is the mask itself.
    tokens, probability = 96, 0.25
    qkv = torch.zeros(tokens, 2, 3, 96, device=DEVICE)
    qkv[:, :, 2] = torch.eye(tokens, device=DEVICE)[:, None]
    # A head as wide as the row, so that every column has a feature of its own.
    (out_THD,) = attend(documents_end([tokens]).to(DEVICE), probability, qkv)
    causal = visible(documents_end([tokens]).to(DEVICE))
    expected_HTT = keep(tokens, 2, probability) & causal
    assert torch.equal(out_THD.transpose(0, 1) != 0, expected_HTT)


@pytest.mark.parametrize(
    "layout", ["fused projection", "heads outermost", "parts outermost", "a slice of a wider row"]
)
def test_strides_are_free(layout: str) -> None:
    end_T = ENDS["padding behind"].to(DEVICE)
    tokens = end_T.numel()
    qkv = {
        "fused projection": normal(tokens, 1, 2 * 3 * 16, seed=1, dtype=torch.float32).view(tokens, 2, 3, 16),
        "heads outermost": normal(2, tokens, 3, 16, seed=1, dtype=torch.float32).transpose(0, 1),
        "parts outermost": normal(tokens, 3, 2, 16, seed=1, dtype=torch.float32).transpose(1, 2),
        "a slice of a wider row": normal(tokens, 4, 4, 16, seed=1, dtype=torch.float32)[:, 1:3, 1:],
    }[layout].detach()
    # Strided as well. Of the projections all but "heads outermost" can be read as a matrix.
    gradient = normal(2, tokens, 16, seed=2, dtype=torch.float32).detach().transpose(0, 1)
    op = functools.partial(attend, end_T, 0.0)
    strided = run_op(op, {"qkv": qkv.requires_grad_()}, [gradient])
    packed = run_op(op, {"qkv": qkv.detach().contiguous().requires_grad_()}, [gradient.contiguous()])
    for name, value in strided.items():
        # Whether a tile is read from a matrix or from four dimensions does not show in a bit.
        assert torch.equal(value, packed[name])
        assert value.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_are_equal_bit_for_bit(dtype: torch.dtype) -> None:
    tokens, repeats = (4001, 50) if DEVICE.type == "cuda" else (150, 1)
    op = functools.partial(attend, random_forest_end(5, tokens, 800).to(DEVICE), 0.1)
    inputs = {"qkv": normal(tokens, 2, 3, 64, seed=1, dtype=dtype)}
    assert_repeats_equal(op, inputs, [normal(tokens, 2, 64, seed=2, dtype=dtype).detach()], repeats)


def test_a_gradient_may_begin_anywhere() -> None:
    end_T = ENDS["padding behind"].to(DEVICE)
    tokens = end_T.numel()
    qkv = normal(tokens, 2, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(tokens, 2, 16, seed=2, dtype=torch.float32).detach()
    # Contiguous, but 4 bytes off what the copy engine counts in.
    shifted = torch.cat([gradient.new_zeros(1), gradient.flatten()])[1:].view_as(gradient)
    assert shifted.data_ptr() % 16
    (out,) = attend(end_T, 0.0, qkv)
    found, expected = (torch.autograd.grad(out, qkv, g, retain_graph=True)[0] for g in (shifted, gradient))
    assert torch.equal(found, expected)


@pytest.mark.slow  # importing the compiler takes half a minute
def test_under_torch_compile() -> None:
    bounds = DocumentBounds.from_end(ENDS["padding behind"].to(DEVICE))
    qkv = normal(bounds.end_T.numel(), 2, 3, 16, seed=1, dtype=torch.float32)

    def loss(qkv: Tensor, bounds: DocumentBounds, key: Tensor) -> Tensor:
        return document_attention(qkv, bounds, 0.25, 0.1, key).square().sum()

    # Two keys, one graph: a key must not become a constant of it.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for key in (key_tensor(1, DEVICE), key_tensor(2, DEVICE)):
        expected, got = loss(qkv, bounds, key), compiled(qkv, bounds, key)
        assert torch.equal(expected, got)
        assert torch.equal(*(torch.autograd.grad(value, qkv)[0] for value in (expected, got)))


@pytest.mark.gpu
def test_a_cuda_graph_draws_new_masks_and_sees_new_documents() -> None:
    ends = [random_forest_end(seed, 512, 200).to(DEVICE) for seed in (1, 2)]
    end_T, key = ends[0].clone(), key_tensor(1, DEVICE)
    qkv = normal(512, 2, 3, 64, seed=1, dtype=torch.bfloat16).detach()

    gradient = normal(512, 2, 64, seed=2, dtype=torch.bfloat16).detach()

    def step() -> tuple[Tensor, Tensor]:
        leaf = qkv.detach().requires_grad_()
        out = document_attention(leaf, DocumentBounds.from_end(end_T), 0.125, 0.1, key)
        return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]

    step()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for new_end_T, new_key in ((ends[1], 2), (ends[0], 3)):
        end_T.copy_(new_end_T)
        key.fill_(new_key)
        # All that a replay reads changes in place; shapes may not.
        qkv.mul_(1.25)
        gradient.neg_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_no_slots() -> None:
    qkv = torch.zeros(0, 2, 3, 16, device=DEVICE, requires_grad=True)
    (out,) = attend(documents_end([]).to(DEVICE), 0.0, qkv)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert out.shape == (0, 2, 16)
    assert gradient.shape == qkv.shape


def test_an_int_key_is_the_tensor_of_its_bits() -> None:
    bounds = DocumentBounds.from_end(documents_end([40]).to(DEVICE))
    qkv = normal(40, 1, 3, 16, seed=1, dtype=torch.float32)
    for op in (document_attention, document_attention_reference):
        by_int = op(qkv, bounds, 0.25, 0.5, KEY)
        assert torch.equal(by_int, op(qkv, bounds, 0.25, 0.5, key_tensor(KEY, DEVICE)))
        assert max_error(by_int, op(qkv, bounds, 0.25, 0.5, KEY + 1)) > 0.1
