"""When the loop ends, what it calls before, and what the ending is called. Steps and saves are stand-ins."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config

from megatron_iml.checkpoint.record import RunState
from megatron_iml.config import ParallelConfig
from megatron_iml.training import loop
from megatron_iml.training.reports import RankReport

STEPS = 4


def run_until(
    signal_at: int, directory: Path, monkeypatch: pytest.MonkeyPatch, first: int = 0
) -> tuple[bool, list[str]]:
    """Train 4 steps, validating every step, with a signal during one; returns (finished, what was done)."""
    done: list[str] = []
    note: Callable[[str], None] = done.append

    steps = iter(range(first + 1, STEPS + 1))

    def fake_step(*arguments: Callable[[], None]) -> SimpleNamespace:
        arguments[-1]()
        return SimpleNamespace(stop=next(steps) == signal_at)

    monkeypatch.setattr(loop, "StopRequest", lambda: SimpleNamespace(received=False))
    monkeypatch.setattr(loop, "step_rows", lambda *unused: None)
    monkeypatch.setattr(loop, "train_step", fake_step)
    monkeypatch.setattr(loop, "step_row", lambda step, *unused: {"step": step})
    monkeypatch.setattr(loop, "validation_losses", lambda *unused: note("validate") or {})
    config = tiny_config()
    store = SimpleNamespace(
        save=lambda engine, state, losses: note(f"save {state.step}") or [],
        before_update=lambda: note("update"),
        poll=lambda: [],
        wait=lambda: note("wait") or [],
    )
    run = SimpleNamespace(
        config=dataclasses.replace(
            config,
            training=dataclasses.replace(config.training, steps=STEPS, validation_interval=1),
            data=dataclasses.replace(config.data, row_length=64),
        ),
        engine=SimpleNamespace(layout=SimpleNamespace(device=torch.device("cpu"), reports=False)),
        directory=directory,
        state=RunState(first, 2 * first, "plan", "corpus"),
        validation_loaders={"level": None},
        train_loader=None,
        store=store,
        introduction=lambda: [],
    )
    return loop.train(run), done


def test_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, done = run_until(0, tmp_path, monkeypatch)
    assert finished and done == ["update", "validate"] * 4 + ["save 4", "wait"]


def test_a_signal_saves_and_leaves_no_time_to_validation(tmp_path, monkeypatch) -> None:
    finished, done = run_until(2, tmp_path, monkeypatch)
    assert not finished and done == ["update", "validate", "update", "save 2", "wait"]


def test_a_signal_in_the_last_step_is_no_early_end(tmp_path, monkeypatch) -> None:
    finished, done = run_until(4, tmp_path, monkeypatch)
    assert finished and done[-3:] == ["validate", "save 4", "wait"]


def test_a_finished_run_has_nothing_to_do(tmp_path, monkeypatch) -> None:
    finished, done = run_until(0, tmp_path, monkeypatch, first=STEPS)
    assert finished and done == ["wait"]


def test_the_slowest_rank_is_compared_with_its_own_stage() -> None:
    """World 4, two stages of two ranks: the second stage is slower by design, rank 3 by accident."""
    config = tiny_config(parallel=ParallelConfig(pipeline_model_parallel_size=2))
    reports = [
        RankReport(forward_seconds=seconds, peak_memory_bytes=gib * 2**30)
        for seconds, gib in ((1.0, 9.0), (1.0, 8.0), (2.0, 5.0), (4.0, 5.0))
    ]
    metrics = loop.rank_metrics(reports, config, is_logged=True)
    assert (metrics["slowest_rank"], metrics["slowest_forward_seconds"]) == (3, 4.0)
    assert metrics["slowest_over_peers"] == pytest.approx(4.0 / 3.0)
    assert (metrics["peak_memory_rank"], metrics["peak_memory_gib"]) == (0, 9.0)
    assert metrics["forward_seconds_by_rank"] == [1.0, 1.0, 2.0, 4.0]
    assert metrics["peak_memory_gib_by_rank"] == [9.0, 8.0, 5.0, 5.0]
    assert "forward_seconds_by_rank" not in loop.rank_metrics(reports, config, is_logged=False)
