"""When the loop ends, what it calls before, and what the ending is called. Steps and saves are stand-ins."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config

from megatron_iml.checkpoint.record import RunState
from megatron_iml.training import loop

STEPS = 4


def run_until(
    signal_at: int,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int = 0,
    levels: tuple[str, ...] = ("level",),
    taken: list[int] | None = None,
) -> tuple[bool, list[str]]:
    """Train 4 steps of 2 rows, validating every step, with a signal during one; returns (finished, what was
    done). Three rows were consumed before; the rows of every step go into `taken`."""
    done: list[str] = []
    note: Callable[[str], None] = done.append
    rows_taken = [] if taken is None else taken

    steps = iter(range(first + 1, STEPS + 1))

    def fake_step(*arguments: Callable[[], None]) -> SimpleNamespace:
        arguments[-1]()
        return SimpleNamespace(stop=next(steps) == signal_at)

    monkeypatch.setattr(loop, "StopRequest", lambda: SimpleNamespace(received=False))
    monkeypatch.setattr(loop, "step_rows", lambda loader, rows, *unused: rows_taken.extend(rows))
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
        state=RunState(first, 3, "plan", "corpus"),
        validation_loaders=dict.fromkeys(levels),
        train_loader=None,
        store=store,
        introduction=lambda: [],
    )
    return loop.train(run), done


def test_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished, done = run_until(0, tmp_path, monkeypatch)
    assert finished and done == ["update", "validate"] * 4 + ["save 4", "wait"]


def test_rows_go_on_from_those_consumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the step's number: the run may have begun with batches of another size."""
    rows: list[int] = []
    run_until(0, tmp_path, monkeypatch, first=1, taken=rows)
    assert rows == [3, 4, 5, 6, 7, 8]


def test_without_levels_nothing_is_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, done = run_until(0, tmp_path, monkeypatch, levels=())
    assert done == ["update"] * 4 + ["save 4", "wait"]


def test_a_signal_saves_and_leaves_no_time_to_validation(tmp_path, monkeypatch) -> None:
    finished, done = run_until(2, tmp_path, monkeypatch)
    assert not finished and done == ["update", "validate", "update", "save 2", "wait"]


def test_a_signal_in_the_last_step_is_no_early_end(tmp_path, monkeypatch) -> None:
    finished, done = run_until(4, tmp_path, monkeypatch)
    assert finished and done[-3:] == ["validate", "save 4", "wait"]


def test_a_finished_run_has_nothing_to_do(tmp_path, monkeypatch) -> None:
    finished, done = run_until(0, tmp_path, monkeypatch, first=STEPS)
    assert finished and done == ["wait"]
