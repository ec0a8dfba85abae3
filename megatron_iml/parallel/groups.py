"""Process groups of a run: the only place that reads megatron-core's `parallel_state`.

What enters: a checked `Config` and the environment that torchrun or SLURM sets (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). What leaves: a `Layout`, this rank's place in the tensor x pipeline x data grid,
which is passed to whoever needs it; nobody asks a global.

    world 8, TP2, PP2:   data parallel size 2; rank 5 has tensor rank 1, data rank 0, pipeline rank 1
"""

import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_iml.config import Config

from .cpu_adapter import install_cpu_adapter


@dataclass(frozen=True)
class Layout:
    """This rank's place in the grid. `groups` is megatron-core's ProcessGroupCollection."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    data_rank: int
    data_size: int
    device: torch.device
    groups: Any

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the LM head."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for all: the first one that knows the loss."""
        return self.is_last_stage and self.tensor_rank == 0 and self.data_rank == 0


def world_size_from_environment() -> int:
    """WORLD_SIZE as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_distributed(config: Config) -> Layout:
    """Join the world, build every group and return this rank's place. Uses NCCL on GPUs, gloo on the CPU.

    Raises:
        ValueError: if the launcher says how many ranks there are but not which one this is.
    """
    install_cpu_adapter()
    world_size = world_size_from_environment()
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
    # Every process would take itself for rank 0 and wait for the others.
    if world_size > 1 and missing:
        raise ValueError(
            f"environment: got WORLD_SIZE {world_size} without {' and '.join(missing)}; allowed: all of "
            "them or none; start with torchrun or examples/train_slurm.sh, or set what is missing"
        )
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    # Before any NCCL call, which would else open a context on device 0 from every rank.
    if on_gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    # A process may have joined by itself, as those of the tests do.
    if not dist.is_initialized():
        # Without a launcher there is no address to meet at, and a fixed port would clash with another run.
        alone = world_size == 1 and "MASTER_ADDR" not in os.environ
        dist.init_process_group(
            backend="nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world_size,
            store=dist.HashStore() if alone else None,
            timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
            # Connects at once: a broken fabric shows here, not in the first step.
            device_id=device if on_gpu else None,
        )
    # First of all: ranks that disagree on a size would wait for one another while groups are built.
    check_same_config(config)
    return place_in_grid(config, device)


def check_same_config(config: Config) -> None:
    """Raise ValueError on every rank unless all were started with one configuration.

    Ranks with another seed would draw other dropout masks, and with other sizes wait for groups that nobody
    else builds.
    """
    # By field, so that the message can name one.
    mine = {
        f"{section}.{name}": value
        for section, fields in asdict(config).items()
        for name, value in fields.items()
    }
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for key in mine:
        values = [str(theirs[key]) for theirs in everyone]
        if len(set(values)) == 1:
            continue
        # Who is right cannot be known here; the few are called the odd ones.
        common = max(values, key=values.count)
        odd = [rank for rank, value in enumerate(values) if value != common]
        raise ValueError(
            f"{key}: got {values[odd[0]]} on ranks {odd} and {common} on the others; allowed: one value "
            "everywhere; start every rank with the same file and overrides"
        )


def place_in_grid(config: Config, device: torch.device) -> Layout:
    """Build megatron-core's groups over the world that is already joined."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel = config.parallel
    # Its default order of ranks, tensor, data, pipeline, is the one that `place_of_rank` counts by.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        # megatron-core takes whole minutes, and 0 would end every collective.
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
        # Second groups on the host beside those below: a checkpoint gathers nothing, so none is ever used.
        create_gloo_process_groups=False,
    )
    # The block forks this tracker under sequence parallelism. Our masks never draw from it.
    model_parallel_cuda_manual_seed(config.training.seed)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor_model_parallel_size,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline_model_parallel_size,
        virtual_size=parallel.virtual_pipeline_model_parallel_size or 1,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def leave_grid() -> None:
    """Drop megatron-core's groups but stay in the world, so that another layout can be tried in one
    process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def stop_distributed() -> None:
    """Leave the world."""
    leave_grid()
    if dist.is_initialized():
        dist.destroy_process_group()
