"""A rank's place in the grid."""

import pytest
import torch
import torch.distributed as dist
from helpers import single_rank, tiny_config

from megatron_iml.parallel.groups import Layout, start_distributed, world_size_from_environment


def place(tensor: int, pipeline: int, data: int, pipeline_size: int = 2) -> Layout:
    return Layout(0, 8, tensor, 2, pipeline, pipeline_size, 1, data, 2, torch.device("cpu"), None)


def test_one_rank_speaks_for_all() -> None:
    places = [place(t, p, d) for t in range(2) for p in range(2) for d in range(2)]
    assert [layout.reports for layout in places].count(True) == 1
    speaker = next(layout for layout in places if layout.reports)
    # The loss is known on the last stage.
    assert (speaker.tensor_rank, speaker.pipeline_rank, speaker.data_rank) == (0, 1, 0)
    assert speaker.is_last_stage and not speaker.is_first_stage


def test_a_world_of_one_and_again() -> None:
    for _ in range(2):
        with single_rank(tiny_config()) as layout:
            assert (layout.rank, layout.world_size, layout.data_size) == (0, 1, 1)
            assert layout.is_first_stage and layout.is_last_stage and layout.reports
            assert layout.groups.tp.size() == 1
        assert not dist.is_initialized()


def test_world_size_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size_from_environment() == 1
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert world_size_from_environment() == 64


def test_a_world_without_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="got WORLD_SIZE 2 without RANK; allowed: all of them or none"):
        start_distributed(tiny_config())
    assert not dist.is_initialized()
