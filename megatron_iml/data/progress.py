"""Shows how far long work is: a bar with rate and time left on a terminal, lines in a log file.

What enters: the number of items, then what was done. What leaves, on stderr so that stdout holds results:

    Tokenising 12,000,000 of 18,000,000 examples, 91,204/s, 0:01:06 left, 412 MiB private memory

Memory is what this process and its workers hold for themselves; mapped files do not count.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn


class Meter:
    """Counts items done; made by `showing_progress`."""

    def __init__(self, progress: Progress, what: str, unit: str, log_interval: int) -> None:
        self._progress = progress
        self._bar = progress.add_task(what, total=None)
        self._what = what
        self._unit = unit
        self._log_interval = log_interval
        self._total = self._done = self._logged = 0
        self._began = time.monotonic()

    def start(self, total: int) -> None:
        """Say how many items there are; time counts from here."""
        self._began = time.monotonic()
        self.expect(total)

    def expect(self, total: int) -> None:
        """Say how many items there are, where that is known only after some are done; time goes on."""
        self._total = total
        self._progress.update(self._bar, total=total)

    def advance(self, items: int) -> None:
        """Count items; log a line whenever another `log_interval` of them is done."""
        self._done += items
        self._progress.advance(self._bar, items)
        if self._done - self._logged >= self._log_interval:
            self._logged = self._done
            # Soft-wrapped: rich breaks lines at 80 columns where there is no terminal.
            self._progress.console.print(self._line(), soft_wrap=True, highlight=False)

    def _line(self) -> str:
        rate = self._done / max(time.monotonic() - self._began, 1e-3)
        # Rows may take more documents than were expected; a negative timedelta would print as "-1 day, ...".
        left = timedelta(seconds=round(max(self._total - self._done, 0) / rate))
        memory = private_memory_bytes() / 2**20
        return (
            f"{self._what} {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left} left, "
            f"{memory:,.0f} MiB private memory"
        )


@contextmanager
def showing_progress(what: str, unit: str, log_interval: int) -> Iterator[Meter]:
    """A meter for work called `what` on items called `unit`."""
    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # A bar in a log file is thousands of lines, so a file gets lines of its own alone.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Meter(progress, what, unit, log_interval)


def private_memory_bytes() -> int:
    """Memory of this process and its workers that no other process shares."""
    this = psutil.Process()
    total = 0
    for process in (this, *this.children(recursive=True)):
        try:
            # USS: pages of no other process. RSS would count the mapped files, once in every process.
            total += process.memory_full_info().uss
        except psutil.NoSuchProcess:
            # A worker may end between the listing and the look.
            continue
    return int(total)
