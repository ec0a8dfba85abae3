"""What happened to every instance a reader met: nothing is lost without a reason.

What enters: a reader counts each raw instance it meets (`counts.read += 1`) and each one it cannot use
(`counts.drop(reason)`); the bench writer counts the rows it writes and drops. What leaves: one record per
task that must close:

    read 200 = written {train: 150, validation: 20, test: 20} + dropped {"blank target": 10}

`repaired` counts changes that keep the instance (a duplicate reference removed, a number turned into text),
`skipped_files` the files that hold no task at all.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class TaskCounts:
    """The account of one task."""

    read: int = 0
    written: Counter[str] = field(default_factory=Counter)
    """Rows by split."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Instances by reason."""
    repaired: Counter[str] = field(default_factory=Counter)
    """Changes to instances that stayed, by kind."""

    def drop(self, reason: str, count: int = 1) -> None:
        """Count instances that will not be written."""
        self.dropped[reason] += count

    def check_closes(self, name: str) -> None:
        """Read must equal written plus dropped; anything else is a fault of a reader or of the writer."""
        written, dropped = self.written.total(), self.dropped.total()
        # An assert: no input may cause this.
        assert self.read == written + dropped, (
            f"ledger of {name} does not close: read {self.read}, written {written}, dropped {dropped}"
        )

    def as_json(self) -> dict[str, Any]:
        """The record in ledger.json; keys sorted, so that equal runs write equal bytes."""
        return {
            "read": self.read,
            "written": dict(sorted(self.written.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "repaired": dict(sorted(self.repaired.items())),
        }


class Drops:
    """The accounts of all tasks of one bench, and the files that were passed over.

    Args:
        root: the folder that names of skipped files are relative to; without one they are as readers met
            them. Relative, since a ledger says the same on every machine.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.skipped_files: dict[str, str] = {}
        self._root = root
        self._tasks: dict[tuple[str, str], TaskCounts] = {}

    def task(self, benchmark: str, name: str) -> TaskCounts:
        """The account of a task; a reader and the writer ask for the same object."""
        # One object for whoever asks: the reader counts what is read, the writer what is written.
        return self._tasks.setdefault((benchmark, name), TaskCounts())

    def skip_file(self, path: Path, reason: str) -> None:
        """Record a file or folder that yields no task, e.g. one of zero bytes."""
        # relpath, since a skipped folder may lie beside the root, where Path.relative_to fails.
        # From the common root: two sources may hold files of one name.
        name = path if self._root is None else Path(os.path.relpath(path, self._root))
        self.skipped_files[name.as_posix()] = reason
