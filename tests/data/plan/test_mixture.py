"""Mixture files: what stands in them, and the mistakes they can hold."""

from pathlib import Path

import pytest

from megatron_iml.data.plan.mixture import Mixture, Proportion, load_mixture


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mixture.yaml"
    path.write_text(text)
    return path


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
    path = write(tmp_path, "max_epochs: 4\nbenchmarks: {A: {proportion: 1, unit: tokens, max_epochs: 0.5}}\n")
    mixture = load_mixture(path)
    assert mixture == Mixture(4096, {"A": Proportion(1.0, "tokens", 0.5)}, 4.0)
    assert mixture.as_dict() == {
        "examples_proportional_cap": 4096,
        "max_epochs": 4.0,
        "skip_absent": False,
        "benchmarks": {"A": {"proportion": 1.0, "unit": "tokens", "max_epochs": 0.5}},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cap: 3", "unknown key 'cap'; "),
        ("examples_proportional_caps: 3", "did you mean examples_proportional_cap"),
        ("examples_proportional_cap: 0", "is 0, expected a whole number from 1 up"),
        ("skip_absent: 1", "skip_absent is 1, expected true or false"),
        ("max_epochs: 0", "max_epochs is 0, expected a number above 0; leave it out for no bound"),
        ("max_epochs: .inf", "max_epochs is inf, expected a number above 0"),
        (
            "benchmarks: {NIV2: {proportion: 1, unit: tokens, max_epochs: yes}}",
            "benchmark NIV2 max_epochs is True, expected a number above 0",
        ),
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


def test_the_mixture_of_the_paper() -> None:
    mixture = load_mixture(Path(__file__).parents[3] / "examples" / "real" / "mixture.yaml")
    assert mixture.examples_proportional_cap == 4096
    shares = {name: share.proportion for name, share in mixture.benchmarks.items() if share.proportion}
    eight = {"CrossFit": 4, "ExMix": 2, "FLAN": 20, "NIV2": 25, "PromptSource": 45, "T5": 2, "UnifiedSKG": 2}
    expected = {name: percent * 0.0094 for name, percent in eight.items()}
    assert shares == pytest.approx(expected | {"Reasoning": 0.01, "Pretraining": 0.05})
    units = {share.unit for name, share in mixture.benchmarks.items() if name != "Pretraining"}
    assert (units, mixture.benchmarks["Pretraining"].unit) == ({"examples"}, "tokens")
