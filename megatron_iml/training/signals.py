"""Leaving in good order: SIGTERM or SIGUSR1 asks for a checkpoint and an exit that a launcher can tell from a
crash.

kill -USR1 <pid>        # SLURM: --signal=USR1@180; the run saves, then exits with status 75
"""

import signal
from types import FrameType

EXIT_REQUEUE = 75
"""sysexits.h EX_TEMPFAIL: nothing is wrong, start me again."""


class StopRequest:
    """Whether a signal has reached this rank; ranks tell one another in the step's report (`reports.py`)."""

    # Handlers stay for the life of the process: a second signal while the checkpoint is written does no harm.
    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Nothing more: a collective inside a handler would interrupt another one.
        self.received = True
