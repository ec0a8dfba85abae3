"""What makes two evaluations the same, comparable, or neither."""

import json
from dataclasses import asdict, replace
from hashlib import sha256

import pytest

from megatron_iml.config.schema import Config, DataConfig, EvaluationConfig, ModelConfig
from megatron_iml.evaluation.conditions import (
    RESULT_FORMAT_VERSION,
    Conditions,
    check_comparable,
    conditions_from_config,
    task_fingerprint,
)

CONDITIONS = Conditions(
    checkpoint="runs/a",
    checkpoint_fingerprint="c1",
    bench_fingerprint="b1",
    tokenizer_fingerprint="t1",
    split="test",
    examples_per_task=250,
    scoring="sum",
    inference_prefix="none",
    max_new_tokens=256,
    max_positions=2048,
    precision="bf16",
)


def test_conditions_of_a_config() -> None:
    config = Config(
        model=ModelConfig(inference_prefix="eos", max_position_embeddings=2048),
        data=DataConfig(row_length=512),
        evaluation=EvaluationConfig(
            split="validation", examples_per_task=7, scoring="mean", max_new_tokens=9
        ),
    )
    made = conditions_from_config(
        config, checkpoint="runs/a", checkpoint_fingerprint="c1", bench="b1", tokenizer="t1"
    )
    assert made == replace(
        CONDITIONS,
        split="validation",
        examples_per_task=7,
        scoring="mean",
        inference_prefix="eos",
        max_new_tokens=9,
        max_positions=512,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_fingerprint": "c2"},
        {"tokenizer_fingerprint": "t2"},
        {"split": "validation"},
        {"examples_per_task": 0},
        {"scoring": "mean"},
        {"inference_prefix": "eos"},
        {"max_new_tokens": 255},
        {"max_positions": 1024},
        {"precision": "fp32"},
    ],
)
def test_fingerprint_changes_with_what_decides_the_numbers(change: dict[str, object]) -> None:
    changed = replace(CONDITIONS, **change)
    assert task_fingerprint(changed, "f1", "rouge_l") != task_fingerprint(CONDITIONS, "f1", "rouge_l")


def test_fingerprint_does_not_follow_the_order_of_fields() -> None:
    facts = asdict(CONDITIONS) | {"file_sha256": "f1", "metric": "rouge_l"}
    facts |= {"format_version": RESULT_FORMAT_VERSION}
    del facts["checkpoint"], facts["bench_fingerprint"]
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    assert task_fingerprint(CONDITIONS, "f1", "rouge_l") == sha256(text.encode()).hexdigest()


def test_fingerprint_of_other_file_or_metric_differs() -> None:
    ours = task_fingerprint(CONDITIONS, "f1", "rouge_l")
    assert task_fingerprint(CONDITIONS, "f2", "rouge_l") != ours
    assert task_fingerprint(CONDITIONS, "f1", "exact_match") != ours


def test_fingerprint_ignores_names_and_the_rest_of_the_bench() -> None:
    moved = replace(CONDITIONS, checkpoint="elsewhere/a", bench_fingerprint="b2")
    assert task_fingerprint(moved, "f1", "rouge_l") == task_fingerprint(CONDITIONS, "f1", "rouge_l")


def test_baseline_may_be_another_checkpoint_with_its_own_prefix() -> None:
    baseline = replace(CONDITIONS, checkpoint="base", checkpoint_fingerprint="c0", inference_prefix="eos")
    check_comparable(CONDITIONS, baseline)


@pytest.mark.parametrize(
    "change",
    [
        {"bench_fingerprint": "b2"},
        {"tokenizer_fingerprint": "t2"},
        {"split": "validation"},
        {"examples_per_task": 0},
        {"scoring": "mean"},
        {"max_new_tokens": 255},
        {"max_positions": 1024},
        {"precision": "fp32"},
    ],
)
def test_baseline_under_other_conditions_is_refused(change: dict[str, object]) -> None:
    [name] = change
    with pytest.raises(ValueError, match=f"under other conditions \\({name}: got"):
        check_comparable(CONDITIONS, replace(CONDITIONS, **change))


def test_refusal_names_every_difference() -> None:
    baseline = replace(CONDITIONS, bench_fingerprint="b0", examples_per_task=10)
    message = r"bench_fingerprint: got b0, needed b1; examples_per_task: got 10, needed 250\).*evaluate"
    with pytest.raises(ValueError, match=message):
        check_comparable(CONDITIONS, baseline)
