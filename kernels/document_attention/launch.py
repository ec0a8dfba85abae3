"""Launches the attention kernels: allocates what they write, describes what they read, looks up sizes.

The sizes were measured once on an H100 (kernels/README.md) and are data here: nothing is tuned at run time,
so two machines of a job run the same code and two runs add up in the same order.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..philox import keep_threshold
from .backward import _key_gradients, _query_gradient, _repair_backward
from .bounds import KEY_TILE, QUERY_TILE, TileSchedule
from .forward import _forward, _repair_forward

REPAIR_SPAN = 64
"""Tiles that one program of a repair kernel looks after: few programs, since they rarely have work."""


@dataclass(frozen=True)
class LaunchSize:
    """Slots of a visited tile, warps of a program, depth of its software pipeline."""

    visited: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class LaunchSizes:
    """Of the three kernels of a call. The forward and dQ visit pieces of the schedule's KEY_TILE slots."""

    forward: LaunchSize
    query_gradient: LaunchSize
    key_gradients: LaunchSize


HALF_64 = LaunchSizes(LaunchSize(64, 4, 2), LaunchSize(64, 4, 2), LaunchSize(32, 4, 3))
"""16-bit, head size up to 64."""
HALF_128 = LaunchSizes(LaunchSize(64, 4, 3), LaunchSize(64, 4, 2), LaunchSize(64, 4, 2))
"""16-bit, head size 128. Shared memory of two programs of each kernel just fits a multiprocessor."""
HALF_128_DROPOUT = LaunchSizes(LaunchSize(64, 4, 2), LaunchSize(64, 4, 2), LaunchSize(64, 4, 2))
"""The same where the mask's 4 KiB take the room of the forward's third stage."""
HALF_PADDED = LaunchSizes(LaunchSize(64, 4, 2), LaunchSize(64, 4, 2), LaunchSize(32, 4, 3))
"""16-bit, head size between: own tiles come through registers, so larger pieces would spill."""
FLOAT = LaunchSizes(LaunchSize(16, 8, 1), LaunchSize(16, 8, 1), LaunchSize(16, 8, 1))
"""fp32 has no tensor cores without TF32: small pieces keep its unrolled products compilable."""


@dataclass(frozen=True)
class Problem:
    """What both directions are told of a call."""

    qkv_TH3D: Tensor
    end_T: Tensor
    schedule: TileSchedule
    dropout_key: Tensor
    softmax_scale: float
    dropout_probability: float
    first_head: int

    @property
    def block(self) -> int:
        """Head size of a tile: a power of two, 16 at least for tensor cores."""
        return max(16, triton.next_power_of_2(self.qkv_TH3D.shape[3]))

    @property
    def flat(self) -> bool:
        """Whether [T, H, 3, D] can be read as a matrix [T, row] whose columns hold one head's part each."""
        return self.qkv_TH3D.shape[3] == self.block and self.row <= self.qkv_TH3D.stride(0)

    @property
    def row(self) -> int:
        """Elements from the first of a slot to its last."""
        _, heads, _, head_dim = self.qkv_TH3D.shape
        return (heads - 1) * self.qkv_TH3D.stride(1) + 2 * self.qkv_TH3D.stride(2) + head_dim

    @property
    def sizes(self) -> LaunchSizes:
        """What the tables above say."""
        if self.qkv_TH3D.dtype == torch.float32:
            return FLOAT
        if self.block <= 64:
            return HALF_64
        if self.qkv_TH3D.shape[3] < self.block:
            return HALF_PADDED
        return HALF_128_DROPOUT if self.dropout_probability > 0.0 else HALF_128

    @property
    def grid(self) -> tuple[int, int]:
        """Programs: heads by query tiles."""
        return self.qkv_TH3D.shape[1], self.schedule.num_key_tiles_Q.numel()

    @property
    def constants(self) -> dict[str, int | str | bool]:
        """Compile-time arguments of all kernels."""
        return {
            "R": QUERY_TILE,
            "D": self.block,
            "HEAD_DIM": self.qkv_TH3D.shape[3],
            "FLAT": self.flat,
            "DROPOUT": self.dropout_probability > 0.0,
            # TF32, Triton's default for fp32, keeps 10 bits of the fraction.
            "PRECISION": "ieee" if self.qkv_TH3D.dtype == torch.float32 else "tf32",
        }

    @property
    def dropout(self) -> tuple[int, float, int]:
        """Threshold of kept words, factor on what is kept, and the first head's plane of the mask."""
        probability = self.dropout_probability
        return keep_threshold(probability), 1.0 / (1.0 - probability), self.first_head

    @property
    def scale2(self) -> float:
        """The scale of scores in units of log 2."""
        return self.softmax_scale * math.log2(math.e)

    def describe(self, slots: int) -> TensorDescriptor:
        """Descriptor of the projection for tiles of `slots` slots."""
        qkv, block = self.qkv_TH3D, self.block
        if self.flat:
            return TensorDescriptor(qkv, [qkv.shape[0], self.row], [qkv.stride(0), 1], [slots, block])
        return TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), [slots, 1, 1, block])

    def describe_gradient(self, grad_THD: Tensor, slots: int) -> TensorDescriptor:
        """Descriptor of the output's gradient, contiguous, for tiles of `slots` slots."""
        tokens, heads, head_dim = grad_THD.shape
        if head_dim == self.block:
            row = heads * head_dim
            return TensorDescriptor(grad_THD, [tokens, row], [row, 1], [slots, head_dim])
        return TensorDescriptor(
            grad_THD, list(grad_THD.shape), list(grad_THD.stride()), [slots, 1, self.block]
        )


def launch_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse2, fp32 [H, T]."""
    qkv, schedule, size = problem.qkv_TH3D, problem.schedule, problem.sizes.forward
    tokens, heads, _, head_dim = qkv.shape
    out_THD = qkv.new_empty(tokens, heads, head_dim)
    lse2_HT = qkv.new_empty(heads, tokens, dtype=torch.float32)
    if tokens == 0:
        return out_THD, lse2_HT
    num_tiles = math.prod(problem.grid)
    nan_QH = torch.empty(num_tiles, dtype=torch.int32, device=qkv.device)
    arguments = (
        problem.describe(QUERY_TILE), problem.describe(size.visited), out_THD, lse2_HT, nan_QH, problem.end_T,
        schedule.key_tiles_QK, schedule.num_key_tiles_Q, problem.dropout_key,
        *qkv.stride()[1:3], schedule.key_tiles_QK.stride(0), tokens, problem.scale2, *problem.dropout,
    )  # fmt: skip
    constants = problem.constants | {"K": KEY_TILE, "C": size.visited} | size.options()
    _forward[problem.grid](*arguments, **constants)
    repair_grid = (triton.cdiv(num_tiles, REPAIR_SPAN),)
    _repair_forward[repair_grid](*arguments, num_tiles, heads, SPAN=REPAIR_SPAN, **constants)
    return out_THD, lse2_HT


def launch_backward(problem: Problem, out_THD: Tensor, lse2_HT: Tensor, grad_THD: Tensor) -> Tensor:
    """Return the gradient of qkv, [T, H, 3, D] contiguous; `grad_THD` is contiguous too."""
    qkv, schedule, sizes = problem.qkv_TH3D, problem.schedule, problem.sizes
    tokens, heads = qkv.shape[:2]
    d_qkv_TH3D = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return d_qkv_TH3D
    num_tiles = math.prod(problem.grid)
    nan_2QH = torch.empty(2 * num_tiles, dtype=torch.int32, device=qkv.device)
    delta_HT = torch.empty_like(lse2_HT)
    qkv_own, grad_own = problem.describe(QUERY_TILE), problem.describe_gradient(grad_THD, QUERY_TILE)
    qkv_keys = problem.describe(sizes.query_gradient.visited)
    qkv_queries = problem.describe(sizes.key_gradients.visited)
    grad_queries = problem.describe_gradient(grad_THD, sizes.key_gradients.visited)
    written = (d_qkv_TH3D, lse2_HT, delta_HT, nan_2QH, problem.end_T)
    tiles = (schedule.key_tiles_QK, schedule.num_key_tiles_Q)
    stops = (schedule.stop_Q, schedule.common_stop_Q)
    strides, list_stride = qkv.stride()[1:3], schedule.key_tiles_QK.stride(0)
    numbers = (tokens, problem.softmax_scale, problem.scale2, *problem.dropout)
    key = problem.dropout_key
    _query_gradient[problem.grid](
        qkv_own, grad_own, qkv_keys, out_THD, *written, *tiles, key, *strides, list_stride, *numbers,
        K=KEY_TILE, C=sizes.query_gradient.visited, **problem.constants, **sizes.query_gradient.options(),
    )  # fmt: skip
    _key_gradients[problem.grid](
        qkv_own, qkv_queries, grad_queries, *written, *stops, key, *strides, *numbers,
        C=sizes.key_gradients.visited, **problem.constants, **sizes.key_gradients.options(),
    )  # fmt: skip
    _repair_backward[(triton.cdiv(2 * num_tiles, REPAIR_SPAN),)](
        qkv_own, grad_own, qkv_queries, qkv_keys, grad_queries, out_THD, *written, *tiles, *stops, key,
        *strides, list_stride, *numbers, num_tiles, heads,
        K=KEY_TILE, KEYS=sizes.query_gradient.visited, QUERIES=sizes.key_gradients.visited,
        SPAN=REPAIR_SPAN, **problem.constants, num_warps=8, num_stages=1,
    )  # fmt: skip
    return d_qkv_TH3D
