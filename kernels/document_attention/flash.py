"""Document attention by flash-attn's varlen functions: a second backend, where that package is installed.

    attend = flash_attention(load_varlen())
    out_THD = attend(qkv_TH3D, RowBounds.from_host(end_T, device), softmax_scale)

Enters and leaves what `reference.py` says, as far as flash-attn computes it: documents back to back, padding
only behind them, bf16 or fp16, no dropout (our masks are functions of coordinates, its masks of a generator).
Everything else is refused.

    end [3 3 3 5 5 5], two documents and a slot of padding  ->  edges [0 3 5], longest 3, 5 real slots

Its functions take query, key and value as strided views of the fused projection and give three gradients; one
pass joins them. The number of documents decides a tensor's size, so it is read from `end` on the host, once a
row: nothing waits for the device. Looked for in this order, the first that is installed is taken:

    flash-attn-4 (4.0.0b36)    flash_attn.cute          its calls read off its source
    flash-attn-3 (3.0)         flash_attn_interface     same arguments
    flash-attn (2.4.1 on)      flash_attn               the first with a deterministic backward

T slots of the row, R real ones, H heads, D head size, N documents.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bounds import DocumentBounds

PACKAGES = {
    "flash-attn-4": "flash_attn.cute",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn",
}
"""Distributions and the modules that hold their varlen function, newest first."""

Varlen = Callable[..., Any]
"""flash_attn_varlen_func: all versions take the arguments that `flash_attention` passes, by these names."""


@dataclass(frozen=True)
class Sequences:
    """The documents of a row in flash-attn's terms."""

    edges_N: Tensor
    """int32 [N + 1] on the device: document n lies in slots edges[n] to edges[n + 1]."""
    longest: int
    num_real: int

    @classmethod
    def from_end(cls, end_T: Tensor, device: torch.device) -> "Sequences":
        """Find the documents in `end` on the host.

        Raises:
            ValueError: documents that share a prefix, or padding before a document.
        """
        index_T = torch.arange(end_T.numel(), dtype=end_T.dtype)
        # A slot of padding does not even see itself.
        is_real_T = end_T > index_T
        num_real = int(is_real_T.sum())
        if not bool(is_real_T[:num_real].all()):
            slot = int(is_real_T.logical_not().nonzero()[0])
            raise ValueError(
                f"flash attention: slot {slot} is padding and lies before a document; allowed: padding "
                "behind all documents; pack the row so, or use the triton or reference attention"
            )
        ends_R = end_T[:num_real]
        # Intervals are nested or disjoint: ends that never fall are those of documents back to back.
        falls = (ends_R.diff() < 0).nonzero()
        if falls.numel():
            slot = int(falls[0])
            raise ValueError(
                f"flash attention: slot {slot} is seen up to slot {int(ends_R[slot]) - 1}, the next one only "
                f"up to {int(ends_R[slot + 1]) - 1}, so documents share a prefix; allowed: plain documents; "
                "build the plan without --share-prefixes, or use the triton or reference attention"
            )
        # As many as there are documents: a size that only the host can know without waiting.
        edges_N = torch.cat([ends_R.new_zeros(1), ends_R.unique_consecutive()])
        longest = int(edges_N.diff().max()) if num_real else 0
        if device.type == "cuda":
            # From pageable memory the copy would wait for all that is queued on the device.
            edges_N = edges_N.pin_memory()
        return cls(edges_N.to(device, non_blocking=True), longest, num_real)


@dataclass(frozen=True, kw_only=True)
class RowBounds(DocumentBounds):
    """Bounds that keep `end` on the host too."""

    host_end_T: Tensor

    @classmethod
    def from_host(cls, end_T: Tensor, device: torch.device) -> "RowBounds":
        """Bounds on `device` of an int32 tensor in memory; beyond the row's end it means that end."""
        # flash-attn believes the edges that it is given, and would read on behind the row.
        end_T = end_T.clamp(max=end_T.numel())
        source_T = end_T.pin_memory() if device.type == "cuda" else end_T
        # The sum of end - column, of which padding has 0.
        pairs = int(end_T.sum(dtype=torch.int64)) - end_T.numel() * (end_T.numel() - 1) // 2
        bounds = DocumentBounds.from_end(source_T.to(device, non_blocking=True), pairs)
        # vars, not asdict: the schedule is to stay a TileSchedule.
        return cls(**vars(bounds), host_end_T=end_T)

    @cached_property
    def sequences(self) -> Sequences:
        """Found when the first layer asks: other backends never do."""
        return Sequences.from_end(self.host_end_T, self.end_T.device)


def load_varlen() -> Varlen:
    """The varlen function of the newest flash-attn that is installed.

    Raises:
        ValueError: none is.
    """
    for distribution, module in PACKAGES.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        # Not caught: a package that is installed and broken is not passed over for another.
        return importlib.import_module(module).flash_attn_varlen_func
    raise ValueError(
        f"flash attention: none of {', '.join(PACKAGES)} is installed; allowed: one of them; install it "
        "(pip install flash-attn), or use the triton or reference attention"
    )


def flash_attention(varlen: Varlen) -> Callable[..., Tensor]:
    """Document attention, in the signature of `reference.py`, by a varlen function of flash-attn."""

    def document_attention_flash(
        qkv_TH3D: Tensor,
        bounds: DocumentBounds,
        softmax_scale: float,
        dropout_probability: float = 0.0,
        dropout_key: int | Tensor = 0,
        first_head: int = 0,
    ) -> Tensor:
        """As `document_attention_reference`; `dropout_key` and `first_head` belong to masks that are not
        drawn.

        Raises:
            ValueError: dropout, shared prefixes, padding before a document.
        """
        if dropout_probability != 0.0:
            raise ValueError(
                f"flash attention: dropout_probability is {dropout_probability}; allowed: 0, since "
                "flash-attn cannot draw masks that are functions of coordinates; set it to 0, or use the "
                "triton or reference attention"
            )
        assert isinstance(bounds, RowBounds), f"{type(bounds).__name__} does not keep `end` on the host"
        sequences = bounds.sequences
        q_RHD, k_RHD, v_RHD = _RealSlots.apply(qkv_TH3D, sequences.num_real)
        # A row of padding has no documents to attend in; its zeros still depend on the input.
        out_RHD = q_RHD
        if sequences.num_real:
            # Versions 3 and 4 return the sums of exponentials too.
            found = varlen(
                q_RHD,
                k_RHD,
                v_RHD,
                cu_seqlens_q=sequences.edges_N,
                cu_seqlens_k=sequences.edges_N,
                max_seqlen_q=sequences.longest,
                max_seqlen_k=sequences.longest,
                softmax_scale=softmax_scale,
                causal=True,
                # Bits must repeat, in the self-test and after a resumption.
                deterministic=True,
            )
            out_RHD = found[0] if isinstance(found, tuple) else found
        padding = qkv_TH3D.shape[0] - sequences.num_real
        return torch.nn.functional.pad(out_RHD, (0, 0, 0, 0, 0, padding)) if padding else out_RHD

    return document_attention_flash


class _RealSlots(torch.autograd.Function):
    """Views of query, key and value of the first R slots; the backward writes each gradient once."""

    @staticmethod
    def forward(ctx: Any, qkv_TH3D: Tensor, num_real: int) -> tuple[Tensor, ...]:
        """Three [R, H, D], strided."""
        ctx.shape = qkv_TH3D.shape
        return qkv_TH3D[:num_real].unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_RHD: Tensor) -> tuple[Tensor, None]:
        """[T, H, 3, D], zero in padding."""
        # autograd's own backward of the slice would fill a second [T, H, 3, D] and copy into it.
        num_real = gradients_RHD[0].shape[0]
        d_qkv_TH3D = gradients_RHD[0].new_empty(ctx.shape)
        torch.stack(gradients_RHD, dim=2, out=d_qkv_TH3D[:num_real])
        # new_empty: padding is written too.
        d_qkv_TH3D[num_real:] = 0
        return d_qkv_TH3D, None
