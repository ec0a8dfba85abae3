"""The tensors of a run in megatron-core's form, which says of each where it lies in the whole.

sharded_state(engine, is_loading=False)     weights, fp32 weights, Adam moments, step counts, loss scale
master_weights_problem(tensors)             None, or what is about to be saved wrong
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_iml.model.opt import OPTModel
from megatron_iml.training.engine import Engine
from megatron_iml.training.optimizer import STATE_PREFIX

MASTER_PREFIX = f"{STATE_PREFIX}param."


def sharding() -> dict[str, Any]:
    """The form of optimizer state; made anew, since megatron-core writes its process groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_chunks(chunks: Sequence[OPTModel]) -> dict[str, Any]:
    """Weights of this rank's chunks, by the chunk's name."""
    # megatron-core's own names, which its optimizer looks chunks up by.
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=sharding()) for name, chunk in zip(names, chunks, strict=True)
    }


def sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    """Everything a checkpoint holds; a load fills the optimizer's tensors where they are."""
    chunks = sharded_chunks(engine.chunks)
    # It wants the state of a lone chunk bare.
    weights = chunks["model"] if len(chunks) == 1 else chunks
    optimizer = engine.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=sharding())
    return {**chunks, "optimizer": optimizer}


def sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    """All tensors among the values."""
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def owned_bytes(state: dict[str, Any], data_rank: int) -> int:
    """Bytes that this rank adds to a checkpoint at most: its optimizer state, and one copy of the weights."""
    return sum(
        tensor.data.nbytes
        for tensor in sharded_tensors(state)
        # Every data rank lists all weights of its stage; they are written once.
        if data_rank == 0 or tensor.key.startswith(STATE_PREFIX)
    )


def master_weights_problem(state: dict[str, Any]) -> str | None:
    """Compare the fp32 weights about to be written with the model's own, box by box.

    megatron-core 0.16.1 can gather them shifted (see training/optimizer.py); nothing that reads the files
    with the same code would notice.
    """
    weights: dict[str, list[ShardedTensor]] = {}
    for tensor in sharded_tensors(state):
        weights.setdefault(tensor.key, []).append(tensor)
    # Box by box, where they lie: gathering whole tensors is what the save avoids.
    masters = [tensor for key in weights if key.startswith(MASTER_PREFIX) for tensor in weights[key]]
    names = [master.key.removeprefix(MASTER_PREFIX) for master in masters]
    wrong = [
        name for name, master in zip(names, masters, strict=True) if not _is_rounded(master, weights[name])
    ]
    if not wrong:
        return None
    return (
        f"rank {dist.get_rank()}: the master weights about to be saved differ from the model's in "
        f"{len(wrong)} of {len(masters)} parts, first {wrong[0]}: nothing was written; this is a bug, please "
        "report it with the layout"
    )


def _is_rounded(master: ShardedTensor, weights: Sequence[ShardedTensor]) -> bool:
    """Whether a box of master weights, rounded, is what the one of `weights` that it lies in holds there."""
    ours = _with_stacked_axes(master)
    for weight in weights:
        theirs = _with_stacked_axes(weight)
        place = [at - start for at, start in zip(master.global_offset, weight.global_offset, strict=True)]
        ends = [at + size for at, size in zip(place, ours.shape, strict=True)]
        # Interleaved stages hold several layers of one stacked name: the box lies in one of them.
        if min(place) >= 0 and all(end <= size for end, size in zip(ends, theirs.shape, strict=True)):
            part = theirs[tuple(slice(at, end) for at, end in zip(place, ends, strict=True))]
            return torch.equal(ours.to(part.dtype), part)
    raise AssertionError(f"{master.key} at {master.global_offset} lies in no weight of this rank")


def _with_stacked_axes(tensor: ShardedTensor) -> torch.Tensor:
    """Its data with the axis that layers are stacked along, which a layer's own parameter lacks."""
    # A view: indexing with None adds axes of size one.
    return tensor.data.detach()[(None,) * tensor.prepend_axis_num]
