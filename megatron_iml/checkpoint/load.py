"""Reads native checkpoints under any layout, after every byte that is read was found as it was written.

check_checkpoint(folder, rank, world_size)      before anything is built: this rank's share of the files
load_run(folder, engine)                        weights, fp32 weights, moments, step: the run goes on
load_weights(folder, chunks, model)             weights only
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_iml.config import ModelConfig
from megatron_iml.model.opt import OPTModel
from megatron_iml.training.engine import Engine

from .record import (
    Record,
    RunState,
    check_files,
    check_same_shape,
    complete_checkpoints,
    files_of,
    read_record,
)
from .sharded import MASTER_PREFIX, sharded_chunks, sharded_state, sharded_tensors


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it; a collective, the same path on every rank."""
    # Shared file systems show new files to other nodes late: ranks that each looked could load two steps.
    found = complete_checkpoints(directory)
    names = [found[-1].name if found else None]
    dist.broadcast_object_list(names, src=0)
    return None if names[0] is None else directory / names[0]


def check_share_of_files(folder: Path, record: Record, weights_only: bool) -> None:
    """Verify this rank's share of the files that are going to be read; the ranks together verify all.

    Raises:
        ValueError: naming each file that is missing, truncated or changed.
    """
    files = files_of(record, weights_only)
    # In turn: files of one kind are neighbours in this order, and about equally large.
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    check_files(folder, {name: files[name] for name in mine})


def load_run(folder: Path, engine: Engine) -> RunState:
    """Fill weights, master weights and moments from a checkpoint of this or another layout or precision."""
    record = read_record(folder)
    # megatron-core would complain of one tensor's shape; this names every size that differs.
    check_same_shape(folder, record.config["model"], engine.config.model)
    # Of this layout: megatron-core reads from each stored chunk the part that falls into ours.
    state = sharded_state(engine, is_loading=True)
    weights = {name: value for name, value in state.items() if name != "optimizer"}
    if record.config["training"]["precision"] != engine.config.training.precision:
        # Rounded once, from the fp32 weights, not again from what the other precision had left of them.
        for tensor in sharded_tensors(weights):
            tensor.key = MASTER_PREFIX + tensor.key
    # Apart: in fp32 a master weight is the weight itself, and must not be filled twice in unknown order.
    _load_chunks(engine.chunks, dist_checkpointing.load(weights, str(folder)))
    # The tensors in it are the optimizer's own, filled already; the dict brings step counts and loss scale.
    loaded = dist_checkpointing.load({"optimizer": state["optimizer"]}, str(folder))
    engine.optimizer.load_state_dict(loaded["optimizer"])
    return record.state


def load_weights(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig) -> None:
    """Fill weights only, under any layout."""
    record = read_record(folder)
    check_same_shape(folder, record.config["model"], model)
    _load_chunks(chunks, dist_checkpointing.load(sharded_chunks(chunks), str(folder)))


def _load_chunks(chunks: Sequence[OPTModel], tensors: dict[str, Any]) -> None:
    for name, chunk in zip(sharded_chunks(chunks), chunks, strict=True):
        chunk.load_state_dict(tensors[name])
