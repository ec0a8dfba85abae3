"""The learning rate at every corner of the schedule."""

import pytest

from megatron_iml.config import OptimizerConfig
from megatron_iml.training.schedule import learning_rate


def test_opt_imls_schedule() -> None:
    config = OptimizerConfig(learning_rate=5e-5, warmup_steps=60)
    rates = [learning_rate(step, 4000, config) for step in range(4000)]
    assert rates[0] == pytest.approx(5e-5 / 60)
    assert rates[29] == pytest.approx(2.5e-5)
    assert rates[59] == rates[60] == pytest.approx(5e-5)
    assert rates[60 + 1970] == pytest.approx(2.5e-5)
    assert rates[3999] == pytest.approx(5e-5 / 3940)
    assert learning_rate(4000, 4000, config) == 0.0
    assert all(a < b for a, b in zip(rates[:59], rates[1:60], strict=True))
    assert all(a > b for a, b in zip(rates[60:-1], rates[61:], strict=True))


def test_decay_ends_at_the_minimum() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=0)
    assert [learning_rate(step, 4, config) for step in range(6)] == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2, 0.2]
    )


def test_warm_up_of_the_whole_run() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
