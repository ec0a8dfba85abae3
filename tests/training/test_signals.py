"""A signal asks for a stop; nothing happens until the ranks agree."""

import os
import signal
from collections.abc import Iterator

import pytest
from helpers import single_rank, tiny_config

from megatron_iml.training.signals import EXIT_REQUEUE, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_both_signals_ask_for_a_stop(number: signal.Signals) -> None:
    with single_rank(tiny_config()) as layout:
        stop = StopRequest()
        assert not stop.agreed(layout.device)
        os.kill(os.getpid(), number)
        assert stop.agreed(layout.device) and stop.agreed(layout.device)


def test_exit_status_is_that_of_a_temporary_failure() -> None:
    assert EXIT_REQUEUE == os.EX_TEMPFAIL
