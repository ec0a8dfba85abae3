"""A rank of a world that is not there: its place is real, its tensors are shapes, nothing is left behind."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

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


# In a process of its own, since the adapter of this one may be there already. The host says that it has CUDA.
ON_A_GPU_HOST = """
import sys
from unittest import mock
import torch
from helpers import tiny_config
from megatron_iml.model.build import build_model
from megatron_iml.parallel.fake_world import fake_world

asked = ("current_device", "default_generators", "get_rng_state", "synchronize", "_lazy_call")
before = [vars(torch.cuda)[name] for name in asked]
with mock.patch.object(torch.cuda, "is_available", lambda: True):
    with fake_world(tiny_config(), 0, 1) as layout:
        (chunk,) = build_model(tiny_config(), layout)
    assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
assert [vars(torch.cuda)[name] for name in asked] == before, "something of the fake world stayed"
try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError):
    sys.exit(0)
sys.exit("the CPU still answers for CUDA")
"""


def test_a_host_with_gpus_is_not_asked_and_gets_itself_back() -> None:
    tests = str(Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_GPU_HOST],
        env={**os.environ, "PYTHONPATH": tests, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
