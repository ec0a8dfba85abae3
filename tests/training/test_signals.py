"""A signal asks for a stop; nothing more happens in the handler."""

import os
import signal
from collections.abc import Iterator

import pytest

from megatron_iml.training.signals import EXIT_REQUEUE, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_both_signals_ask_for_a_stop(number: signal.Signals) -> None:
    stop = StopRequest()
    assert not stop.received
    os.kill(os.getpid(), number)
    assert stop.received


def test_exit_status_is_that_of_a_temporary_failure() -> None:
    assert EXIT_REQUEUE == os.EX_TEMPFAIL
