"""Launches the attention kernels: allocates what they write and looks up how many warps and stages they take.

The sizes were measured once on an H100 (kernels/README.md) and are data here: nothing is tuned at run time,
so two machines of a job run the same code and two runs add up in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..philox import keep_threshold
from .backward import _backward, _delta
from .bounds import KEY_TILE, QUERY_TILE, TileSchedule
from .forward import _forward


@dataclass(frozen=True)
class LaunchSize:
    """Warps of a program, depth of its software pipeline, and the most registers a thread may take."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int | None]:
        """As keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Problem:
    """What both directions are told of a call. `schedule` holds the fields of a TileSchedule in order."""

    qkv_TH3D: Tensor
    end_T: Tensor
    schedule: TileSchedule
    dropout_key: Tensor
    softmax_scale: float
    dropout_probability: float
    first_head: int

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: heads by query tiles."""
        return self.qkv_TH3D.shape[1], self.schedule.num_key_tiles_Q.numel()

    @property
    def size(self) -> dict[str, int | str | bool]:
        """Compile-time arguments of both kernels."""
        head_dim, dtype = self.qkv_TH3D.shape[3], self.qkv_TH3D.dtype
        return {
            "R": QUERY_TILE,
            "C": KEY_TILE,
            "D": max(16, triton.next_power_of_2(head_dim)),
            "HEAD_DIM": head_dim,
            "DROPOUT": self.dropout_probability > 0.0,
            # TF32, Triton's default for fp32, keeps 10 bits of the fraction.
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        }

    @property
    def scale2(self) -> float:
        """The scale of scores in units of log 2."""
        return self.softmax_scale * math.log2(math.e)

    @property
    def keep_scale(self) -> float:
        """Factor on the probabilities that are kept."""
        return 1.0 / (1.0 - self.dropout_probability)


def forward_size(problem: Problem) -> LaunchSize:
    """The measured best of the forward kernel."""
    if problem.qkv_TH3D.dtype == torch.float32:
        return LaunchSize(num_warps=8, num_stages=1)
    return LaunchSize(num_warps=4, num_stages=2)


def backward_size(problem: Problem) -> LaunchSize:
    """The measured best of the backward kernel."""
    if problem.qkv_TH3D.dtype == torch.float32:
        return LaunchSize(num_warps=8, num_stages=1)
    return LaunchSize(num_warps=4, num_stages=2)


def launch_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse2, fp32 [H, T]."""
    qkv, schedule = problem.qkv_TH3D, problem.schedule
    tokens, heads, _, head_dim = qkv.shape
    out_THD = qkv.new_empty(tokens, heads, head_dim)
    lse2_HT = qkv.new_empty(heads, tokens, dtype=torch.float32)
    if tokens == 0:
        return out_THD, lse2_HT
    _forward[problem.grid](
        qkv, out_THD, lse2_HT, problem.end_T,
        schedule.key_tiles_QK, schedule.num_key_tiles_Q, schedule.forward_order_Q, problem.dropout_key,
        *qkv.stride()[:3], schedule.key_tiles_QK.stride(0), tokens,
        problem.scale2, keep_threshold(problem.dropout_probability), problem.keep_scale, problem.first_head,
        **problem.size, **forward_size(problem).options(),
    )  # fmt: skip
    return out_THD, lse2_HT


def launch_backward(problem: Problem, out_THD: Tensor, lse2_HT: Tensor, grad_THD: Tensor) -> Tensor:
    """Return the gradient of qkv, [T, H, 3, D] contiguous."""
    qkv, schedule = problem.qkv_TH3D, problem.schedule
    tokens, heads, _, head_dim = qkv.shape
    d_qkv_TH3D = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return d_qkv_TH3D
    delta_HT = torch.empty_like(lse2_HT)
    size = problem.size
    _delta[problem.grid](
        out_THD, grad_THD, delta_HT, *grad_THD.stride()[:2], tokens,
        R=QUERY_TILE, D=size["D"], HEAD_DIM=head_dim, num_warps=4,
    )  # fmt: skip
    _backward[problem.grid](
        qkv, grad_THD, d_qkv_TH3D, lse2_HT, delta_HT, problem.end_T,
        schedule.key_tiles_QK, schedule.num_key_tiles_Q, schedule.stop_Q, schedule.common_stop_Q,
        schedule.backward_order_Q, problem.dropout_key,
        *qkv.stride()[:3], *grad_THD.stride()[:2], schedule.key_tiles_QK.stride(0), tokens,
        problem.softmax_scale, problem.scale2, keep_threshold(problem.dropout_probability),
        problem.keep_scale, problem.first_head,
        **size, **backward_size(problem).options(),
    )  # fmt: skip
    return d_qkv_TH3D


def problem_of(
    qkv_TH3D: Tensor, end_T: Tensor, schedule: Sequence[Tensor], dropout_key: Tensor, scale: float,
    probability: float, first_head: int,
) -> Problem:  # fmt: skip
    """Gather an op's flat arguments."""
    return Problem(qkv_TH3D, end_T, TileSchedule(*schedule), dropout_key, scale, probability, first_head)
