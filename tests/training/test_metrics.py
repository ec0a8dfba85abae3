"""A row of metrics.jsonl: rates over all ranks, and who is slow among its peers."""

import dataclasses
from types import SimpleNamespace

import pytest
from helpers import tiny_config

from megatron_iml.config import DataConfig, ParallelConfig
from megatron_iml.training.metrics import rank_metrics, step_row
from megatron_iml.training.reports import RankReport
from megatron_iml.training.rows import StepRows
from megatron_iml.training.step import StepResult


def test_rates_count_real_tokens_of_all_ranks() -> None:
    """Two rows of 48 slots with 72 real tokens, in half a second on a world of four."""
    config = dataclasses.replace(tiny_config(), data=DataConfig(row_length=48))
    run = SimpleNamespace(config=config, engine=SimpleNamespace(layout=SimpleNamespace(world_size=4)))
    rows = StepRows([], 2, 30, num_real=72, num_documents=5, useful_flops=8e12, documents_crc=77)
    reports = (RankReport(forward_seconds=0.1),) * 4
    result = StepResult(3.0, 30, 0.5, 1.0, skipped=False, reports=reports)
    row = step_row(12, 1e-4, rows, result, 0.5, run)
    assert (row["step"], row["real_tokens"], row["targets"], row["documents"]) == (12, 72, 30, 5)
    assert row["fill"] == 0.75
    assert (row["real_tokens_per_second"], row["target_tokens_per_second"]) == (144.0, 60.0)
    # 8 TFLOP of all ranks in half a second, over four of them.
    assert row["useful_tflops_per_gpu"] == pytest.approx(4.0)


def test_the_slowest_rank_is_compared_with_its_own_stage() -> None:
    """World 4, two stages of two ranks: the second stage is slower by design, rank 3 by accident."""
    config = tiny_config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    reports = [
        RankReport(forward_seconds=seconds, peak_memory_bytes=gib * 2**30)
        for seconds, gib in ((1.0, 9.0), (1.0, 8.0), (2.0, 5.0), (4.0, 5.0))
    ]
    metrics = rank_metrics(reports, config, is_logged=True)
    assert (metrics["slowest_rank"], metrics["slowest_forward_seconds"]) == (3, 4.0)
    assert metrics["slowest_over_peers"] == pytest.approx(4.0 / 3.0)
    assert (metrics["peak_memory_rank"], metrics["peak_memory_gib"]) == (0, 9.0)
    assert metrics["forward_seconds_by_rank"] == [1.0, 1.0, 2.0, 4.0]
    assert metrics["peak_memory_gib_by_rank"] == [9.0, 8.0, 5.0, 5.0]
    assert "forward_seconds_by_rank" not in rank_metrics(reports, config, is_logged=False)
