"""Mixtures: the shares that files and caps lead to, worked by hand, and the mistakes a file can hold."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_iml.data.mixture import (
    Mixture,
    Proportion,
    TaskSize,
    explain,
    largest_remainder,
    load_mixture,
    task_shares,
)

NIV2_LONG = TaskSize("NIV2__a__long", "NIV2", documents=6000, tokens=200.0, target_tokens=10.0)
NIV2_SHORT = TaskSize("NIV2__a__short", "NIV2", documents=1024, tokens=50.0, target_tokens=5.0)
FLAN = TaskSize("FLAN__b__one", "FLAN", documents=512, tokens=100.0, target_tokens=40.0)
REPLAY = TaskSize("replay__c__all", "replay", documents=90, tokens=1000.0, target_tokens=999.0)
TASKS = [NIV2_LONG, NIV2_SHORT, FLAN, REPLAY]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    return path


def mixture(**shares: tuple[float, str]) -> Mixture:
    return Mixture(4096, {name: Proportion(part, unit) for name, (part, unit) in shares.items()})


def shares_of(mixture: Mixture, unit: str) -> dict[str, float]:
    """What each benchmark really gets, counted in a unit."""
    shares = task_shares(mixture, TASKS)
    amounts = {task.name: share * task.per_draw(unit) for task, share in zip(TASKS, shares, strict=True)}
    total = sum(amounts.values())
    return {
        name: sum(amounts[task.name] for task in TASKS if task.benchmark == name) / total
        for name in ("NIV2", "FLAN", "replay")
    }


def test_cap_alone() -> None:
    shares = task_shares(Mixture(4096), TASKS)
    assert shares.tolist() == pytest.approx([4096 / 5722, 1024 / 5722, 512 / 5722, 90 / 5722])


def test_benchmarks_by_examples() -> None:
    shares = task_shares(
        mixture(NIV2=(0.5, "examples"), FLAN=(0.3, "examples"), replay=(0.2, "examples")), TASKS
    )
    # Within NIV2 the capped sizes decide: 4096 to 1024.
    assert shares.tolist() == pytest.approx([0.4, 0.1, 0.3, 0.2])


def test_replay_by_tokens_beside_examples() -> None:
    asked = mixture(NIV2=(0.57, "examples"), FLAN=(0.38, "examples"), replay=(0.05, "tokens"))
    assert shares_of(asked, "tokens")["replay"] == pytest.approx(0.05)
    drawn = shares_of(asked, "examples")
    assert drawn["NIV2"] / drawn["FLAN"] == pytest.approx(57 / 38)
    # 5 % of the examples would have been far more of the tokens: the unit matters.
    by_examples = mixture(NIV2=(0.57, "examples"), FLAN=(0.38, "examples"), replay=(0.05, "examples"))
    assert shares_of(by_examples, "tokens")["replay"] > 0.25


def test_worked_example_of_the_module_head() -> None:
    tasks = [
        TaskSize("NIV2__a__b", "NIV2", 10, 100.0, 9.0),
        TaskSize("replay__a__b", "replay", 10, 1000.0, 999.0),
    ]
    shares = task_shares(mixture(NIV2=(0.95, "examples"), replay=(0.05, "tokens")), tasks)
    assert shares.tolist() == pytest.approx([0.99476, 0.00524], abs=1e-5)


@pytest.mark.parametrize("unit", ["tokens", "target_tokens"])
def test_one_unit_for_all(unit: str) -> None:
    asked = mixture(NIV2=(0.6, unit), FLAN=(0.3, unit), replay=(0.1, unit))
    assert shares_of(asked, unit) == pytest.approx({"NIV2": 0.6, "FLAN": 0.3, "replay": 0.1})


def test_zero_leaves_a_benchmark_out() -> None:
    shares = task_shares(mixture(NIV2=(1.0, "examples"), FLAN=(0, "tokens"), replay=(0, "examples")), TASKS)
    assert shares.tolist() == pytest.approx([0.8, 0.2, 0, 0])


def test_benchmarks_must_match_the_corpus() -> None:
    with pytest.raises(ValueError, match="benchmark 'NIV3', the corpus lacks it; near: NIV2"):
        task_shares(mixture(NIV3=(1.0, "examples")), TASKS)
    with pytest.raises(ValueError, match="has benchmark 'replay', the mixture gives it no proportion"):
        task_shares(mixture(NIV2=(0.5, "examples"), FLAN=(0.5, "examples")), TASKS)
    nothing = TaskSize("replay__c__all", "replay", documents=3, tokens=0.0, target_tokens=0.0)
    with pytest.raises(ValueError, match="'replay' has no usable document"):
        task_shares(
            mixture(NIV2=(0.5, "tokens"), FLAN=(0.4, "tokens"), replay=(0.1, "tokens")), [*TASKS[:3], nothing]
        )


def test_explain() -> None:
    long, _, _, replay = explain(Mixture(4096), TASKS, draws=57220)
    assert (long.examples, long.effective_examples) == (6000, 4096)
    assert long.epochs == pytest.approx(40960 / 6000)
    assert replay.share == pytest.approx(90 / 5722)
    assert (replay.tokens, replay.target_tokens) == (pytest.approx(900_000), pytest.approx(900 * 999))


def test_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "examples_proportional_cap: 512\nbenchmarks:\n  NIV2: {proportion: 0.95, unit: examples}\n"
        "  replay: {proportion: 0.05, unit: tokens}\n",
    )
    assert load_mixture(path) == Mixture(
        512, {"NIV2": Proportion(0.95, "examples"), "replay": Proportion(0.05, "tokens")}
    )
    assert load_mixture(write(tmp_path, "")) == Mixture(4096, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap: 3", "unknown key 'cap'; "),
        ("examples_proportional_caps: 3", "did you mean examples_proportional_cap"),
        ("examples_proportional_cap: 0", "is 0, expected a whole number from 1 up"),
        ("benchmarks: [NIV2]", "expected name: {proportion"),
        ("benchmarks: {NIV2: 0.5}", "benchmark NIV2: got 0.5, expected {proportion"),
        (
            "benchmarks: {NIV2: {proportion: 1, unit: token}}",
            "unit is 'token', expected one of examples, tokens",
        ),
        (
            "benchmarks: {NIV2: {proportion: 1.5, unit: tokens}}",
            "proportion is 1.5, expected a number from 0 to 1",
        ),
        ("benchmarks: {NIV2: {proportion: 1, unit: tokens, caps: 3}}", "benchmark NIV2 unknown key 'caps'"),
        (
            "benchmarks: {A: {proportion: 0.5, unit: examples}, B: {proportion: 0.45, unit: examples}}",
            "sum to 0.95, expected 1",
        ),
        (
            "benchmarks: {A: {proportion: 0.5, unit: tokens}, B: {proportion: 0.5, unit: target_tokens}}",
            "tokens and target_tokens are both units here",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        load_mixture(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_largest_remainder_by_hand() -> None:
    assert largest_remainder(np.array([1 / 3, 1 / 3, 1 / 3]), 4).tolist() == [2, 1, 1]
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]  # 3.5 2.1 1.4
    assert largest_remainder(np.array([0.0, 1.0]), 3).tolist() == [0, 3]


@given(weights=st.lists(st.floats(0.001, 1000), min_size=1, max_size=50), total=st.integers(0, 10_000))
def test_quotas_sum_up_and_are_within_one(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    quotas = largest_remainder(shares, total)
    assert quotas.sum() == total
    assert (np.abs(quotas - shares * total) < 1 + 1e-6).all()
