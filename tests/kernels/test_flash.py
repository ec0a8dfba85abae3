"""flash-attn as a backend: what its varlen function is asked, what comes of it, and what is refused.

Where the package is absent a stand-in takes its place that computes each sequence by itself: on a CPU plain
torch, on a GPU the FlashAttention-2 that torch ships.
"""

import functools
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, normal, torch_varlen
from torch import Tensor

from megatron_iml.kernels.document_attention import (
    DocumentBounds,
    RowBounds,
    document_attention_reference,
    flash_attention,
    load_varlen,
)
from megatron_iml.kernels.document_attention.bounds import LONG_KEY_TILE, SHORT_KEY_TILE
from megatron_iml.kernels.testing import (
    assert_op_within_budget,
    documents_end,
    nan_poison,
    random_forest_end,
    run_op,
    tree_end,
)

SCALE = 0.3
PLAIN = {
    "back to back": documents_end([5, 60, 1, 70]),
    "padding behind": documents_end([5, 60, 1, 70], padding=9),
    "one document": documents_end([63]),
    "documents of one slot": documents_end([1] * 12 + [30]),
    # One interval after the other, which is all that flash-attn is told: as good as a plain document.
    "a trunk with one branch that all of it continues": tree_end(7, [4]),
}


class _Shipped(torch.autograd.Function):
    """torch's own FlashAttention-2."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, edges: Tensor, longest: int, scale: float
    ) -> Tensor:
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, edges, edges, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(q, k, v, out, lse, edges, state, unused)
        ctx.longest, ctx.scale = longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, edges, state, unused = ctx.saved_tensors
        longest = ctx.longest
        gradients = torch.ops.aten._flash_attention_backward(
            gradient.contiguous(), q, k, v, out, lse, edges, edges, longest, longest, 0.0, True, state,
            unused, scale=ctx.scale,
        )  # fmt: skip
        return *gradients, None, None, None


def shipped_varlen(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
    return _Shipped.apply(q, k, v, rest["cu_seqlens_q"], rest["max_seqlen_q"], rest["softmax_scale"])


def attend(op: Callable[..., Tensor], end_T: Tensor, qkv: Tensor) -> tuple[Tensor]:
    return (op(qkv, RowBounds.from_host(end_T, DEVICE), SCALE),)


def dense_attention(end_T: Tensor, qkv: Tensor) -> tuple[Tensor]:
    """Plain torch in the type of qkv, with a mask over the whole row."""
    q, k, v = qkv.permute(2, 1, 0, 3)
    index_T, end_T = torch.arange(len(end_T), device=DEVICE), end_T.to(DEVICE)
    sees_TT = (index_T <= index_T[:, None]) & (index_T[:, None] < end_T)
    scores = (q @ k.transpose(1, 2) * SCALE).masked_fill(~sees_TT, float("-inf"))
    probabilities = torch.softmax(scores.masked_fill(~sees_TT.any(1)[:, None], 0.0), -1) * sees_TT
    return ((probabilities @ v).transpose(0, 1),)


def hold_to_budget(varlen: Callable[..., Any], end_T: Tensor, head_dim: int, dtype: torch.dtype) -> None:
    assert_op_within_budget(
        functools.partial(attend, flash_attention(varlen), end_T),
        functools.partial(dense_attention, end_T),
        functools.partial(attend, document_attention_reference, end_T),
        {"qkv": normal(len(end_T), 2, 3, head_dim, seed=1, dtype=dtype)},
        [normal(len(end_T), 2, head_dim, seed=2, dtype=dtype).detach()],
    )


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rows(name: str) -> None:
    hold_to_budget(torch_varlen, PLAIN[name], 16, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_own_flash_attention(dtype: torch.dtype, head_dim: int) -> None:
    lengths = [700, 1, 64, 65, 3, 900]
    for padding in (0, 77):
        hold_to_budget(shipped_varlen, documents_end(lengths, padding), head_dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_package_itself(dtype: torch.dtype, head_dim: int) -> None:
    try:
        varlen = load_varlen()
    except ValueError as absent:
        pytest.skip(str(absent))
    end_T = documents_end([700, 1, 64, 65, 3, 900], padding=77)
    hold_to_budget(varlen, end_T, head_dim, dtype)
    inputs = {"qkv": normal(len(end_T), 2, 3, head_dim, seed=1, dtype=dtype)}
    gradient = normal(len(end_T), 2, head_dim, seed=2, dtype=dtype).detach()
    op = functools.partial(attend, flash_attention(varlen), end_T)
    first, again = (run_op(op, inputs, [gradient]) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"{name} differs between two runs"


def test_padding_is_zero_and_a_nan_in_it_stays_there() -> None:
    end_T = PLAIN["padding behind"]
    qkv = normal(len(end_T), 2, 3, 16, seed=1, dtype=torch.float32)
    gradient = normal(len(end_T), 2, 16, seed=2, dtype=torch.float32).detach()
    op = functools.partial(attend, flash_attention(torch_varlen), end_T)
    clean = run_op(op, {"qkv": qkv}, [gradient])
    with torch.no_grad():
        qkv[140] = float("nan")  # documents end at 136
    with nan_poison():
        spoilt = run_op(op, {"qkv": qkv}, [gradient])
    for name, value in clean.items():
        assert torch.equal(value, spoilt[name])
        assert not value[136:].any() and value[:136].any(dim=-1).any()


def test_a_row_of_padding_asks_nothing_and_has_a_backward() -> None:
    def never(*arguments: Any, **settings: Any) -> Tensor:
        raise AssertionError("called for a row without documents")

    qkv = normal(6, 2, 3, 16, seed=1, dtype=torch.float32)
    (out,) = attend(flash_attention(never), documents_end([], padding=6), qkv)
    (d_qkv,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(out, torch.zeros(6, 2, 16, device=DEVICE))
    assert torch.equal(d_qkv, torch.zeros_like(qkv))


def test_its_views_are_the_fused_projections_and_so_is_the_gradient() -> None:
    seen: list[Tensor] = []

    def look(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, None]:
        seen.extend((q, k, v))
        return torch_varlen(q, k, v, **settings)

    projected = normal(72, 1, 2 * 3 * 16, seed=1, dtype=torch.float32)
    (out,) = attend(flash_attention(look), documents_end([30, 40], padding=2), projected.view(72, 2, 3, 16))
    # Strided views into the projection's memory: nothing is split or copied on the way in.
    assert all(view.untyped_storage().data_ptr() == projected.untyped_storage().data_ptr() for view in seen)
    (gradient,) = torch.autograd.grad(out.square().sum(), projected)
    assert gradient.is_contiguous() and gradient.isfinite().all() and not gradient[70:].any()


@pytest.mark.parametrize(
    ("end_T", "said"),
    [
        (tree_end(3, [2, 2]), "slot 2 is seen up to slot 6, the next one only up to 4, so documents share"),
        (
            tree_end(3, [2, 1, 3]),
            "slot 2 is seen up to slot 8, the next one only up to 4, so documents share",
        ),
        (torch.tensor([2, 2, 2, 4], dtype=torch.int32), "slot 2 is padding and lies before a document"),
        (torch.tensor([0, 2], dtype=torch.int32), "slot 0 is padding and lies before a document"),
    ],
)
def test_rows_that_are_not_plain_are_refused(end_T: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attend(flash_attention(torch_varlen), end_T, normal(len(end_T), 1, 3, 8, seed=1, dtype=torch.float32))


def test_every_forest_is_refused_or_right() -> None:
    refused = 0
    for seed in range(40):
        end_T = random_forest_end(seed, 40, 12)
        qkv = normal(40, 1, 3, 8, seed=seed, dtype=torch.float32).detach()
        try:
            (out,) = attend(flash_attention(torch_varlen), end_T, qkv)
        except ValueError:
            # Trees and padding in between; what they are refused with has a test of its own.
            refused += 1
            continue
        (truth,) = attend(document_attention_reference, end_T, qkv)
        # Sums of 40 terms of order 1, in another order.
        torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    assert 0 < refused < 40, f"{refused} of 40 rows refused: one branch is not tested"


def test_dropout_is_refused() -> None:
    op, bounds = flash_attention(torch_varlen), RowBounds.from_host(documents_end([8]), DEVICE)
    qkv = normal(8, 1, 3, 8, seed=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"dropout_probability is 0.1; allowed: 0"):
        op(qkv, bounds, SCALE, 0.1, 7, 0)
    # A key and a head without dropout name a mask that is not drawn.
    assert torch.equal(op(qkv, bounds, SCALE, 0.0, 7, 3), op(qkv, bounds, SCALE))


def test_an_end_beyond_the_row_is_the_rows() -> None:
    # flash-attn would read as far as its edges say.
    end_T = torch.full((8,), 200, dtype=torch.int32)
    bounds = RowBounds.from_host(end_T, DEVICE)
    assert bounds.sequences.edges_N.tolist() == [0, 8]
    assert bounds.sequences.longest == 8
    # 36 visible pairs are no long documents.
    assert bounds.schedule.columns == SHORT_KEY_TILE


def test_a_row_counts_its_visible_pairs() -> None:
    # 1,100 slots see 550.5 each on average; over 1,300 slots, of which 200 are padding, that is 466.
    widths = [
        RowBounds.from_host(documents_end([1100], padding), DEVICE).schedule.columns for padding in (0, 200)
    ]
    assert widths == [LONG_KEY_TILE, SHORT_KEY_TILE]


def test_the_documents_of_a_row_are_found_once() -> None:
    # Every layer asks; the search is on the host and would be in the way of each.
    bounds = RowBounds.from_host(PLAIN["padding behind"], DEVICE)
    assert bounds.sequences is bounds.sequences
    assert bounds.sequences.edges_N.tolist() == [0, 5, 65, 66, 136]
    assert (bounds.sequences.longest, bounds.sequences.num_real) == (70, 136)
    plain = DocumentBounds.from_end(PLAIN["padding behind"].to(DEVICE))
    assert torch.equal(bounds.end_T, plain.end_T)


def install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    """Pretend that these distributions, each with its module, are all that is installed."""

    def version(distribution: str) -> str:
        if distribution not in packages:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    for distribution, name in packages.items():
        parent, _, _ = name.rpartition(".")
        if parent:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        # What `load_varlen` returns then says which package it came from.
        vars(module)["flash_attn_varlen_func"] = distribution
        monkeypatch.setitem(sys.modules, name, module)


def test_the_newest_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"flash-attn": "flash_attn"}
    install(monkeypatch, packages)
    assert load_varlen() == "flash-attn"
    packages |= {"flash-attn-3": "flash_attn_interface"}
    install(monkeypatch, packages)
    assert load_varlen() == "flash-attn-3"
    packages |= {"flash-attn-4": "flash_attn.cute"}
    install(monkeypatch, packages)
    assert load_varlen() == "flash-attn-4"


def test_absence_and_breakage_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {})
    with pytest.raises(
        ValueError, match=r"none of flash-attn-4, flash-attn-3, flash-attn is installed; allow"
    ):
        load_varlen()
    # Installed but broken is not absent: an older one must not take over.
    install(monkeypatch, {"flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute"})
    # None makes the import raise ImportError.
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    with pytest.raises(ImportError):
        load_varlen()
