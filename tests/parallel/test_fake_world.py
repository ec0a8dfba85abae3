"""A rank of a world that is not there: its place is real, its tensors are shapes, nothing is left behind."""

import dataclasses

import torch
import torch.distributed as dist
from helpers import single_rank, tiny_config

from megatron_iml.config import ParallelConfig, place_of_rank
from megatron_iml.parallel.fake_world import fake_world

PARALLEL = ParallelConfig(
    tensor_model_parallel_size=4, pipeline_model_parallel_size=8, virtual_pipeline_model_parallel_size=2
)
CONFIG = dataclasses.replace(tiny_config(num_layers=16), parallel=PARALLEL)


def test_every_place_is_megatron_cores() -> None:
    """What the configuration says of a rank, against the groups that megatron-core builds."""
    for rank in (0, 3, 4, 12, 77, 127, 511):
        with fake_world(CONFIG, rank, 512) as layout:
            assert (layout.rank, layout.world_size, layout.data_size) == (rank, 512, 16)
            place = (layout.tensor_rank, layout.data_rank, layout.pipeline_rank)
            assert place == place_of_rank(CONFIG, 512, rank)
            peers = dist.get_process_group_ranks(layout.groups.mp)
            assert {place_of_rank(CONFIG, 512, peer).data for peer in peers} == {layout.data_rank}


def test_what_a_gpu_would_hold_is_shapes() -> None:
    with fake_world(CONFIG, 5, 64):
        huge = torch.empty(2**40, device="cuda", dtype=torch.bfloat16)
        assert huge.device.type == "meta"
        assert huge.type() == "torch.cuda.BFloat16Tensor"
        assert torch.cuda.current_device() == torch.device("meta")
        dist.all_reduce(huge)
    assert not dist.is_initialized()


def test_a_real_world_follows() -> None:
    with fake_world(CONFIG, 5, 64):
        pass
    with single_rank(tiny_config()) as layout:
        total = torch.ones(2, device="cuda")
        dist.all_reduce(total)
        assert total.tolist() == [1.0, 1.0] and total.device == layout.device
