"""The main job through its commands: trained on two ranks, evaluated, killed, resumed."""

import json
import signal
import time
from pathlib import Path

import pytest
from end_to_end.conftest import LEVELS, STEPS, finish, launch, rows_of, signal_all, train_command

from megatron_iml.checkpoint.record import complete_checkpoints

EXACT = ("step", "loss", "learning_rate", "grad_norm", "targets", "documents_crc")


@pytest.fixture(scope="session")
def whole_run(chain: Path) -> Path:
    """An undisturbed run on two ranks."""
    folder = chain / "whole"
    out = finish(
        launch(
            2, "megatron_iml.train", "--config", chain / "train.yaml", f"training.output_directory={folder}"
        )
    )
    assert "self-test passed" in out
    return folder


def test_training_learns_and_leaves_what_it_promises(chain: Path, whole_run: Path):
    rows = rows_of(whole_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    # 320 entries: an untrained model loses ln 320 = 5.77 a target.
    assert abs(rows[0]["loss"] - 5.77) < 0.3
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert all(0.9 < row["fill"] <= 1 and row["real_tokens"] == row["fill"] * 512 for row in rows)
    validation = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert set(validation["validation"]) == set(LEVELS)
    assert (whole_run / "config.yaml").is_file() and list((whole_run / "tensorboard").iterdir())
    assert [folder.name for folder in complete_checkpoints(whole_run / "checkpoints")] == [
        f"iter_{step:07d}" for step in (20, 30, 40)
    ]


def test_evaluation_reports_three_levels_against_the_untrained_model(
    chain: Path, whole_run: Path, tmp_path: Path
):
    config = ("--config", chain / "train.yaml")
    finish(
        launch(
            1, "megatron_iml.evaluate", *config, "--checkpoint", "start", "--output", tmp_path / "untrained"
        )
    )
    trained = (
        "--checkpoint",
        whole_run / "checkpoints" / f"iter_{STEPS:07d}",
        "--baseline",
        tmp_path / "untrained",
    )
    finish(launch(2, "megatron_iml.evaluate", *config, *trained, "--output", tmp_path / "trained"))
    text = (tmp_path / "trained" / "report.md").read_text()
    assert all(level.replace("_", " ") in text for level in LEVELS)
    assert (tmp_path / "trained" / "levels.png").stat().st_size > 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(chain: Path, whole_run: Path):
    folder = chain / "killed"
    command = train_command(chain, folder)
    process = launch(2, *command)
    deadline = time.monotonic() + 120
    # Killed without warning some way past the first checkpoint, wherever the second one is by then.
    while time.monotonic() < deadline and not (
        complete_checkpoints(folder / "checkpoints") and len(rows_of(folder)) >= 15
    ):
        time.sleep(0.02)
    signal_all(process, signal.SIGKILL)
    assert len(rows_of(folder)) < STEPS, "the run was over before it could be killed"
    said = finish(launch(2, *command))
    assert "resumed after step" in said and "changed since then" not in said
    undisturbed, joined = rows_of(whole_run), rows_of(folder)
    assert [[row[key] for key in EXACT] for row in joined] == [
        [row[key] for key in EXACT] for row in undisturbed
    ]


def test_a_run_resumes_under_another_layout(chain: Path, whole_run: Path):
    folder = chain / "moved"
    command = train_command(chain, folder)
    process = launch(2, *command, "checkpoint.save_interval=5")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not complete_checkpoints(folder / "checkpoints"):
        time.sleep(0.02)
    # A polite stop: save, then leave with the status that asks to be started again.
    error = signal_all(process, signal.SIGTERM)
    assert len(rows_of(folder)) < STEPS, "the run was over before it could be stopped"
    saved = complete_checkpoints(folder / "checkpoints")[-1].name
    assert saved == f"iter_{len(rows_of(folder)):07d}", f"a stopped run saves its last step:\n{error}"
    assert "changed since then: checkpoint.save_interval: 5 -> 10" in finish(launch(1, *command))
    undisturbed, joined = rows_of(whole_run), rows_of(folder)
    assert [row["documents_crc"] for row in joined] == [row["documents_crc"] for row in undisturbed]
    # Sums over ranks in another order: fp32 rounding, grown over the steps at a high learning rate.
    for ours, theirs in zip(joined, undisturbed, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
