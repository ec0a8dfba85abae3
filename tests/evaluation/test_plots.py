"""Plots: what is drawn, read back from the figure that is saved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_iml.evaluation.aggregate import Aggregate, Estimate, TaskScore, aggregate
from megatron_iml.evaluation.plots import plot_levels, plot_loss, read_losses


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Every figure that is saved; the file is written all the same."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    yield figures


def scores(held_out: float, supervised: float) -> Aggregate:
    return aggregate(
        [
            TaskScore("a", "b", "c", "fully_held_out", "accuracy", Estimate(held_out, 0.1, 9)),
            TaskScore("d", "b", "c", "fully_supervised", "accuracy", Estimate(supervised, None, 1)),
        ]
    )


def test_bars_of_model_and_baseline(saved: list[Figure], tmp_path: Path) -> None:
    plot_levels(tmp_path / "levels.png", scores(0.5, 0.9), scores(0.25, 0.8))
    [axes] = saved[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([25, 80, 50, 90])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fully held out", "fully supervised"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["baseline", "model"]
    assert (tmp_path / "levels.png").read_bytes().startswith(b"\x89PNG")


def test_loss_curve_takes_the_last_value_of_a_step(saved: list[Figure], tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 9.0}\n{"step": 2, "loss": 2.5}\n'
        '{"step": 2, "validation_loss": 4.0}\n{"step": 3, "loss": 2.0}\n'
    )
    plot_loss(tmp_path / "loss.png", read_losses(metrics))
    [line] = saved[0].axes[0].lines
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.5], [3, 2.0]]
    assert (tmp_path / "loss.png").is_file()


def test_a_run_without_a_step_has_no_loss(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "validation_loss": 4.0}\n{"step": 2, "loss"')
    assert read_losses(tmp_path / "metrics.jsonl") == {}
