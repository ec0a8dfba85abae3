"""The report's files, number by number."""

from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from megatron_iml.evaluation.aggregate import Estimate, TaskScore
from megatron_iml.evaluation.conditions import Conditions
from megatron_iml.evaluation.report import Report, build_report, read_report, report_markdown, write_report

COPA = TaskScore("copa", "flan", "Cause Effect", "fully_held_out", "accuracy", Estimate(0.5, 0.1, 26), 2, 0)
SQUAD = TaskScore("squad|v1", "sni", "QA", "fully_supervised", "rouge_l", Estimate(0.9, None, 1), 0, 1)


@pytest.fixture
def report(conditions: Conditions) -> Report:
    return build_report(conditions, [SQUAD, COPA], None)


@pytest.fixture
def baseline(conditions: Conditions) -> Report:
    base = replace(conditions, checkpoint="opt", checkpoint_fingerprint="c0", inference_prefix="eos")
    copa = replace(COPA, estimate=Estimate(0.25, 0.08, 26))
    squad = replace(SQUAD, estimate=Estimate(1.0, None, 1))
    return build_report(base, [copa, squad], None)


def test_json_holds_conditions_tasks_and_every_average(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report, None)
    content = orjson.loads((tmp_path / "report.json").read_bytes())
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
    }
    assert content["baseline"] is None


def test_read_gives_what_was_written(report: Report, baseline: Report, tmp_path: Path) -> None:
    write_report(tmp_path, report, baseline)
    assert read_report(tmp_path) == report


def test_markdown_tables(report: Report) -> None:
    text = report_markdown(report, None)
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
    text = report_markdown(report, baseline)
    assert "Baseline: opt, fingerprint c0, inference prefix eos." in text
    assert "| level | categories | score | baseline | difference |" in text
    assert "| fully held out | 1 | 50.0 ± 10.0 | 25.0 ± 8.0 | +25.0 |" in text
    assert "| all levels | 2 | 70.0 ± - | 62.5 ± - | +7.5 |" in text
    assert "| QA | squad\\|v1 | sni | rouge_l | 1 | 90.0 ± - | 100.0 ± - | -10.0 | 0 | 1 |" in text


def test_baseline_under_other_conditions_is_refused(conditions: Conditions, baseline: Report) -> None:
    with pytest.raises(ValueError, match="split: got test, needed validation"):
        build_report(replace(conditions, split="validation"), [COPA], baseline)


def test_missing_or_older_report_is_an_error(report: Report, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a baseline is the output folder of an earlier evaluation"):
        read_report(tmp_path)
    write_report(tmp_path, report, None)
    path = tmp_path / "report.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 0'))
    with pytest.raises(ValueError, match="format version 0, this version reads 1; evaluate again"):
        read_report(tmp_path)
