"""The report's files, number by number."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from megatron_iml.evaluation.aggregate import Estimate, TaskScore, aggregate
from megatron_iml.evaluation.conditions import Conditions
from megatron_iml.evaluation.report import Report, read_report, report_markdown, write_report

COPA = TaskScore("copa", "flan", "Cause Effect", "fully_held_out", "accuracy", Estimate(0.5, 0.1, 26), 2, 0)
SQUAD = TaskScore("squad|v1", "sni", "QA", "fully_supervised", "rouge_l", Estimate(0.9, None, 1), 0, 1)


@pytest.fixture
def report(conditions: Conditions) -> Report:
    return Report(conditions, aggregate([SQUAD, COPA]))


@pytest.fixture
def baseline(conditions: Conditions) -> Report:
    base = replace(conditions, checkpoint="opt", checkpoint_fingerprint="c0", inference_prefix="eos")
    copa = replace(COPA, estimate=Estimate(0.25, 0.08, 26))
    squad = replace(SQUAD, estimate=Estimate(1.0, None, 1))
    return Report(base, aggregate([copa, squad]))


def test_json_holds_conditions_tasks_and_every_average(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "new", report, None, None)
    content = orjson.loads((tmp_path / "new" / "report.json").read_bytes())
    assert list(content) == [
        "format_version",
        "conditions",
        "overall",
        "levels",
        "columns",
        "benchmarks",
        "tasks",
        "baseline",
    ]
    assert content["conditions"]["checkpoint_fingerprint"] == "c1"
    assert content["overall"] == {"mean": 0.7, "standard_error": None, "count": 2}
    assert content["levels"] == {
        "fully_held_out": {"mean": 0.5, "standard_error": 0.1, "count": 1},
        "fully_supervised": {"mean": 0.9, "standard_error": None, "count": 1},
    }
    assert content["columns"][0] == {
        "level": "fully_held_out",
        "category": "Cause Effect",
        "mean": 0.5,
        "standard_error": 0.1,
        "count": 1,
    }
    assert content["tasks"][0] == {
        "task": "copa",
        "benchmark": "flan",
        "category": "Cause Effect",
        "level": "fully_held_out",
        "metric": "accuracy",
        "estimate": {"mean": 0.5, "standard_error": 0.1, "count": 26},
        "cut_prompts": 2,
        "unfinished_answers": 0,
        "parent": "",
    }
    assert content["baseline"] is None


def test_read_gives_what_was_written(report: Report, baseline: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report, baseline, None)
    assert read_report(tmp_path) == report


def test_markdown_tables(report: Report) -> None:
    text = report_markdown(report, None, has_loss=False)
    assert text.startswith("# Evaluation of runs/a\n\n| condition | value |\n")
    for condition in ("| bench fingerprint | b1 |", "| max new tokens | 4 |", "| inference prefix | none |"):
        assert condition in text
    assert (
        "## Levels\n\n"
        "| level | categories | score |\n"
        "| --- | ---: | ---: |\n"
        "| fully held out | 1 | 50.0 ± 10.0 |\n"
        "| fully supervised | 1 | 90.0 ± - |\n"
        "| all levels | 2 | 70.0 ± - |\n"
    ) in text
    assert "| fully supervised | QA | squad\\|v1 | sni | rouge_l | 1 | 90.0 ± - | 0 | 1 |" in text
    assert "No mean is weighted" in text


def test_markdown_with_a_baseline(report: Report, baseline: Report) -> None:
    text = report_markdown(report, baseline, has_loss=False)
    assert "Baseline: opt, fingerprint c0, inference prefix eos." in text
    assert "| level | categories | score | baseline | difference |" in text
    assert "| fully held out | 1 | 50.0 ± 10.0 | 25.0 ± 8.0 | +25.0 |" in text
    assert "| all levels | 2 | 70.0 ± - | 62.5 ± - | +7.5 |" in text
    assert "| QA | squad\\|v1 | sni | rouge_l | 1 | 90.0 ± - | 100.0 ± - | -10.0 | 0 | 1 |" in text


def test_plots_are_written_and_named(report: Report, baseline: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report, baseline, None)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "levels.png"}
    assert "loss.png" not in (tmp_path / "report.md").read_text()
    # Of a run that died in its first step.
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path, report, baseline, tmp_path / "metrics.jsonl")
    assert not (tmp_path / "loss.png").exists() and "loss.png" not in (tmp_path / "report.md").read_text()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    write_report(tmp_path, report, baseline, tmp_path / "metrics.jsonl")
    text = (tmp_path / "report.md").read_text()
    assert "![Scores by level](levels.png)" in text and "![Training loss](loss.png)" in text
    assert (tmp_path / "loss.png").is_file()


def test_missing_or_older_report_is_an_error(report: Report, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a baseline is the output folder of an earlier evaluation"):
        read_report(tmp_path)
    write_report(tmp_path, report, None, None)
    path = tmp_path / "report.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 0'))
    with pytest.raises(ValueError, match="format version 0, this version reads 2; evaluate again"):
        read_report(tmp_path)
