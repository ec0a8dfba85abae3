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
from .backward import _backward, _repair_backward
from .bounds import LONG_KEY_TILE, QUERY_TILE, TileSchedule, whole_tiles
from .forward import _forward, _repair_forward

FORWARD_SPAN, BACKWARD_SPAN = 32, 128
"""Tiles that one program of a repair kernel looks after: few programs, since they rarely have work."""


@dataclass(frozen=True)
class LaunchSize:
    """Sizes of a program: warps, depth of its software pipeline, and

    rows            slots of a query tile: 64, or 128 of the schedule's tall tiles (forward only)
    queries         slots that a turn of keys visits at a time, a divisor of QUERY_TILE (backward only)
    max_registers   of a thread, so that one more program fits a multiprocessor; None: as many as it takes

    A turn of queries and the forward visit the schedule's key tiles.
    """

    num_warps: int
    num_stages: int
    rows: int = QUERY_TILE
    queries: int = 0
    max_registers: int | None = None

    def options(self) -> dict[str, int]:
        """What the compiler is told."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages} | limit


HALF = {
    # (long documents, heads above 64, dropout): forward, backward
    (False, False, False): (LaunchSize(4, 3), LaunchSize(4, 3, queries=32, max_registers=128)),
    (False, False, True): (LaunchSize(4, 3), LaunchSize(4, 3, queries=32, max_registers=168)),
    (False, True, False): (LaunchSize(4, 3), LaunchSize(4, 3, queries=32)),
    (False, True, True): (LaunchSize(4, 2), LaunchSize(4, 3, queries=32)),
    (True, False, False): (LaunchSize(4, 3), LaunchSize(4, 2, queries=64, max_registers=168)),
    (True, False, True): (LaunchSize(4, 3), LaunchSize(4, 2, queries=64)),
    (True, True, False): (LaunchSize(4, 2, rows=2 * QUERY_TILE), LaunchSize(4, 2, queries=64)),
    (True, True, True): (LaunchSize(4, 2), LaunchSize(4, 2, queries=64)),
}
"""16-bit. What counts is how many programs share a multiprocessor, whose waits then fill one another's."""
FLOAT = LaunchSize(8, 1), LaunchSize(8, 1, queries=16)
"""fp32 has no tensor cores without TF32: its products are unrolled and spill, for tests it will do."""


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
        # Wider than the head, it is filled with zeros, which add nothing to a score.
        return max(16, triton.next_power_of_2(self.qkv_TH3D.shape[3]))

    @property
    def flat(self) -> bool:
        """Whether [T, H, 3, D] can be read as a matrix [T, row] whose columns hold one head's part each."""
        # Else a box would reach into the head's next part, or rows of the matrix would overlap.
        return self.qkv_TH3D.shape[3] == self.block and self.row <= self.qkv_TH3D.stride(0)

    @property
    def row(self) -> int:
        """Elements from the first of a slot to its last."""
        _, heads, _, head_dim = self.qkv_TH3D.shape
        return (heads - 1) * self.qkv_TH3D.stride(1) + 2 * self.qkv_TH3D.stride(2) + head_dim

    @property
    def sizes(self) -> tuple[LaunchSize, LaunchSize]:
        """What the tables above say."""
        if self.qkv_TH3D.dtype == torch.float32:
            return FLOAT
        # The schedule knows how long documents are: its tiles and these sizes were measured together.
        return HALF[self.schedule.columns == LONG_KEY_TILE, self.block > 64, self.dropout_probability > 0.0]

    @property
    def constants(self) -> dict[str, int | str | bool]:
        """Compile-time arguments of all kernels."""
        return {
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
        # exp2 is one instruction of the GPU; exp is this product and exp2.
        return self.softmax_scale * math.log2(math.e)

    def describe(self, slots: int) -> TensorDescriptor:
        """Descriptor of the projection for tiles of `slots` slots."""
        qkv, block = self.qkv_TH3D, self.block
        if self.flat:
            return TensorDescriptor(qkv, [qkv.shape[0], self.row], [qkv.stride(0), 1], [slots, block])
        return TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), [slots, 1, 1, block])

    def describe_contiguous(self, tensor_THD: Tensor, slots: int) -> TensorDescriptor:
        """Descriptor of a contiguous tensor, [T, H, D] or [T, 3 H, D], for tiles of `slots` slots."""
        tokens, heads, head_dim = tensor_THD.shape
        if head_dim == self.block:
            row = heads * head_dim
            return TensorDescriptor(tensor_THD, [tokens, row], [row, 1], [slots, head_dim])
        shape, strides = list(tensor_THD.shape), list(tensor_THD.stride())
        return TensorDescriptor(tensor_THD, shape, strides, [slots, 1, self.block])


def describe_vector(vector_N: Tensor, numbers: int) -> TensorDescriptor:
    """Descriptor of a vector, for pieces of `numbers` numbers."""
    return TensorDescriptor(vector_N, [vector_N.numel()], [1], [numbers])


def launch_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out [T, H, D] and lse2, fp32 [H, T rounded up to whole tiles]."""
    qkv, schedule, size = problem.qkv_TH3D, problem.schedule, problem.sizes[0]
    tokens, heads, _, head_dim = qkv.shape
    out_THD = qkv.new_empty(tokens, heads, head_dim)
    lse2_HT = qkv.new_empty(heads, whole_tiles(tokens), dtype=torch.float32)
    # Triton makes no descriptor of a tensor without elements.
    if tokens == 0:
        return out_THD, lse2_HT
    key_tiles_QK, num_key_tiles_Q = schedule.key_tiles_QK, schedule.num_key_tiles_Q
    if size.rows > QUERY_TILE:
        key_tiles_QK, num_key_tiles_Q = schedule.tall_key_tiles_PK, schedule.num_tall_key_tiles_P
    tiles = num_key_tiles_Q.numel()
    arguments = (
        problem.describe(size.rows), problem.describe(schedule.columns),
        problem.describe_contiguous(out_THD, size.rows), out_THD, lse2_HT, problem.end_T,
        key_tiles_QK, num_key_tiles_Q, problem.dropout_key,
        *qkv.stride()[1:3], key_tiles_QK.stride(0), lse2_HT.stride(0), tokens, problem.scale2,
        *problem.dropout,
    )  # fmt: skip
    constants = problem.constants | {"R": size.rows, "C": schedule.columns} | size.options()
    # With narrow tiles of large heads the mask costs less than asking whether it is needed.
    constants["MASK_ALL"] = schedule.columns < LONG_KEY_TILE and problem.block > 64
    _forward[heads, tiles](*arguments, **constants)
    repair_grid = (heads, triton.cdiv(tiles, FORWARD_SPAN))
    _repair_forward[repair_grid](*arguments, heads, SPAN=FORWARD_SPAN, **constants)
    return out_THD, lse2_HT


def launch_backward(problem: Problem, out_THD: Tensor, lse2_HT: Tensor, grad_THD: Tensor) -> Tensor:
    """Return the gradient of qkv, [T, H, 3, D] contiguous; `grad_THD` is contiguous too."""
    qkv, schedule, size = problem.qkv_TH3D, problem.schedule, problem.sizes[1]
    tokens, heads = qkv.shape[:2]
    d_qkv_TH3D = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return d_qkv_TH3D
    tiles = schedule.num_key_tiles_Q.numel()
    num_tiles = tiles * heads
    # Filled in every call, and so in every replay of a graph: keys that found an old delta would not wait.
    words = torch.full((lse2_HT.numel() + 2 * num_tiles,), -1, dtype=torch.int32, device=qkv.device)
    delta, nan = words.split([lse2_HT.numel(), 2 * num_tiles])
    delta = delta.view(torch.float32)
    arguments = (
        problem.describe(QUERY_TILE), problem.describe_contiguous(grad_THD, QUERY_TILE),
        problem.describe(schedule.columns), problem.describe(size.queries),
        problem.describe_contiguous(grad_THD, size.queries),
        describe_vector(lse2_HT.flatten(), size.queries), describe_vector(delta, size.queries),
        problem.describe_contiguous(d_qkv_TH3D.flatten(1, 2), QUERY_TILE),
        qkv, grad_THD, out_THD, d_qkv_TH3D, lse2_HT, delta, nan,
        problem.end_T, schedule.key_tiles_QK, schedule.num_key_tiles_Q, schedule.stop_Q,
        schedule.common_stop_Q, schedule.backward_order_W, problem.dropout_key,
        *qkv.stride()[:3], schedule.key_tiles_QK.stride(0), lse2_HT.stride(0), tokens, problem.softmax_scale,
        problem.scale2, *problem.dropout, tiles, heads,
    )  # fmt: skip
    constants = problem.constants | {"R": QUERY_TILE, "KEYS": schedule.columns, "QUERIES": size.queries}
    # Triton's interpreter knows no assembly.
    constants["PREFETCH"] = not triton.knobs.runtime.interpret
    _backward[(2 * num_tiles,)](*arguments, **constants, **size.options())
    _repair_backward[(triton.cdiv(2 * num_tiles, BACKWARD_SPAN),)](
        *arguments, SPAN=BACKWARD_SPAN, **constants, num_warps=8, num_stages=1
    )
    return d_qkv_TH3D
