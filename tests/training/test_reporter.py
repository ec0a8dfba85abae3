"""The trace: every step once, whatever was cut off or done twice; and what a line says."""

import json
from pathlib import Path

import orjson
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_iml.training.reporter import Reporter, step_line

ROW = {
    "step": 7,
    "loss": 2.34567,
    "learning_rate": 5e-5,
    "grad_norm": 0.98765,
    "seconds": 0.5,
    "real_tokens_per_second": 12345.6,
    "target_tokens_per_second": 1234.5,
    "fill": 0.987,
    "useful_tflops_per_gpu": 123.456,
    "slowest_rank": 5,
    "slowest_over_peers": 1.04,
    "loss_scale": 1.0,
    "skipped": False,
}


def row(step: int, loss: float = 1.0) -> dict:
    return {**ROW, "step": step, "loss": loss}


def trace(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_console_line() -> None:
    assert step_line(ROW, steps=4000) == (
        "step    7/4000 | loss 2.3457 | lr 5.00e-05 | grad norm 0.988 | 12,346 real tok/s | "
        "1,234 target tok/s | fill 98.7% | 123 useful TFLOP/s per rank | 500 ms"
    )
    skipped = step_line({**ROW, "loss_scale": 64.0, "skipped": True}, steps=10)
    assert skipped.endswith("| 500 ms | loss scale 64 | SKIPPED: gradient overflow")
    assert step_line({**ROW, "slowest_over_peers": 1.25}, steps=10).endswith(
        "| 500 ms | rank 5 is 25% slower"
    )


def test_steps_and_validation_are_written_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reporter = Reporter(tmp_path, steps=4, first_step=0, log_interval=2, enabled=True)
    for step in (1, 2, 3):
        reporter.step(row(step))
    reporter.validation(3, {"fully_held_out": 3.25})
    # Before it is closed: a killed run leaves what it has done.
    assert [entry["step"] for entry in trace(tmp_path)] == [1, 2, 3, 3]
    assert trace(tmp_path)[3] == {"step": 3, "validation": {"fully_held_out": 3.25}}
    reporter.step(row(4))
    reporter.close()
    printed = capsys.readouterr().out
    assert [f"step {n}/4" in printed for n in (1, 2, 3, 4)] == [False, True, False, True]
    assert "validation | fully_held_out 3.2500" in printed
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert events.Scalars("validation_loss/fully_held_out")[0].value == 3.25


def test_the_trace_is_json_for_every_reader(tmp_path: Path) -> None:
    """A skipped fp16 step has no gradient norm. Python's json alone would read a `NaN` back; orjson, which
    plots the loss, would not."""
    reporter = Reporter(tmp_path, steps=4, first_step=0, log_interval=2, enabled=True)
    reporter.step({**ROW, "step": 1, "grad_norm": float("nan"), "loss": float("inf")})
    reporter.validation(1, {"level": float("nan"), "other": 2.5})
    reporter.close()
    step, validation = (orjson.loads(line) for line in (tmp_path / "metrics.jsonl").open("rb"))
    assert (step["grad_norm"], step["loss"], step["learning_rate"]) == (None, None, 5e-5)
    assert validation == {"step": 1, "validation": {"level": None, "other": 2.5}}


def test_resume_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = Reporter(tmp_path, steps=6, first_step=0, log_interval=1, enabled=True)
    for step in (1, 2, 3, 4):
        first.step(row(step, loss=1.0))
    first.validation(2, {"level": 9.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    second = Reporter(tmp_path, steps=6, first_step=3, log_interval=1, enabled=True)
    for step in (4, 5, 6):
        second.step(row(step, loss=2.0))
    second.close()
    assert [(entry["step"], entry["loss"]) for entry in trace(tmp_path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    Reporter(tmp_path, steps=6, first_step=2, log_interval=1, enabled=True).close()
    assert [entry["step"] for entry in trace(tmp_path)] == [1]


def test_a_fresh_run_starts_a_fresh_trace(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    Reporter(tmp_path, steps=6, first_step=0, log_interval=1, enabled=True).close()
    assert trace(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reporter = Reporter(tmp_path / "run", steps=2, first_step=0, log_interval=1, enabled=False)
    reporter.say("hello")
    reporter.step(row(1))
    reporter.validation(1, {"level": 1.0})
    reporter.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
