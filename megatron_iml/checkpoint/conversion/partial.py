"""A folder in the making: files of full length whose gaps are filled, and a journal of what is filled.

    weights/.opt-6.7b.partial/
      journal.jsonl           {"request": {...}}, then a line for every group of tensors that is on disk
      model.safetensors       its full length from the start
    weights/opt-6.7b/         the same folder under its own name, when everything is in it

Whatever moment a conversion dies at, the folder with its own name is absent or whole; the same command goes
on after the last group of the journal.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megatron_iml.checkpoint.conversion.files.plan import FilePlan

from .target import Piece

JOURNAL = "journal.jsonl"
Checksums = dict[str, dict[str, dict[str, Any]]]
"""File, record, {"bytes", "crc32"}."""


class PartialFolder:
    """The folder beside its final place; a context manager that holds its lock."""

    def __init__(self, output: Path, files: Mapping[str, FilePlan], request: dict[str, Any]) -> None:
        """Take up a conversion that was killed, or lay out all files for a new one.

        Args:
            output: the folder's own name.
            files: every weight file.
            request: what is converted into what; a folder begun for another request is refused.

        Raises:
            ValueError: if the output exists, another process is writing it, the disk is too small, or another
                request had begun it.
        """
        if output.exists():
            raise ValueError(f"{output} exists; nothing is overwritten: name another --output, or remove it")
        self.output, self.plans = output, files
        # A dot, so that no reader of a folder of checkpoints takes it for one.
        self.folder = output.absolute().parent / f".{output.name}.partial"
        self.done: dict[str, Checksums] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            # On the folder: the lock goes with its rename, and a process that dies lets go of it.
            self._lock = _open(self.folder, os.O_RDONLY, opened)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.folder} is being written by another process: wait for it") from None
            if not self._take_up(request):
                self._lay_out(request)
            self._files = {name: _open(self.folder / name, os.O_RDWR, opened) for name in files}
            # Forces a group to disk while the next one is read; one thread, so that the journal is in order.
            self._syncer = opened.enter_context(ThreadPoolExecutor(1))
            self._syncing: Future[None] | None = None
            # From here on all this is closed by `__exit__`.
            self._opened = opened.pop_all()

    def __enter__(self) -> "PartialFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def write_group(self, label: str, pieces: Iterable[Piece]) -> None:
        """Append pieces to their records, force them to disk, and enter the group in the journal.

        The last two happen in the background; `settle` waits for them.
        """
        # By record: how far it is filled, and the CRC-32 up to there. Several pieces may make one up.
        written: dict[tuple[str, str], tuple[int, int]] = {}
        for file, name, tensor in pieces:
            record = self.plans[file].records[name]
            position, checksum = written.get((file, name), (0, 0))
            # As bytes, since numpy has no bf16. Of a view on a mapped file nothing is copied here.
            data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            assert position + len(data) <= record.num_bytes, (
                f"{name}: {len(data)} bytes too many for {record}"
            )
            self._write(file, name, data, record.offset + position)
            written[file, name] = position + len(data), zlib.crc32(data, checksum)
        checksums: Checksums = {}
        for (file, name), (position, checksum) in written.items():
            record = self.plans[file].records[name]
            assert position == record.num_bytes, (
                f"{name}: {position} of {record.num_bytes} bytes were written"
            )
            for place in record.crc_offsets:
                self._write(file, name, memoryview(checksum.to_bytes(4, "little")), place)
            checksums.setdefault(file, {})[name] = {"bytes": position, "crc32": f"{checksum:08x}"}
        # One group behind at most: the pages of two layers are all that is not yet on the disk.
        self.settle()
        self._syncing = self._syncer.submit(self._complete, label, checksums)

    def settle(self) -> None:
        """Wait until every group that was written is in the journal."""
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _complete(self, label: str, checksums: Checksums) -> None:
        # The journal must not say what the disk does not hold.
        for file in checksums:
            os.fsync(self._files[file])
        self._enter({"group": label, "tensors": checksums})
        self.done[label] = checksums

    def checksums(self) -> Checksums:
        """Of every record of every file, when all are on disk."""
        self.settle()
        # From the journal, not from this process: a conversion that goes on did not write all of them.
        files: Checksums = {name: {} for name in self.plans}
        for group in self.done.values():
            for file, records in group.items():
                files[file].update(records)
        missing = [
            f"{file}: {name}"
            for file, plan in self.plans.items()
            for name in plan.records
            if plan.records[name].num_bytes and name not in files[file]
        ]
        assert not missing, f"{len(missing)} gaps were not filled, first {missing[0]}"
        return files

    def write_text(self, name: str, data: bytes) -> None:
        """A small file."""
        with (self.folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def reveal(self) -> None:
        """Give the folder its name; from here on it exists."""
        # The lock is the folder itself, opened: its entries.
        os.fsync(self._lock)
        # Fails, as it should, if somebody has filled a folder of that name meanwhile; replaces an empty one.
        self.folder.rename(self.output)
        parent = os.open(self.folder.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
        # Last: a death before the rename would leave all the work done and nobody to know it.
        (self.output / JOURNAL).unlink()

    def _write(self, file: str, name: str, data: memoryview, offset: int) -> None:
        try:
            # A call writes 2 GiB at most, and a signal may cut it short.
            while data:
                count = os.pwrite(self._files[file], data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            self.settle()
            raise OSError(
                f"{self.folder / file}: tensor {name} could not be written ({error.strerror}); make room and "
                f"run the same command again: it goes on after {len(self.done)} groups of layers"
            ) from error

    def _take_up(self, request: dict[str, Any]) -> bool:
        """Read the journal; False if there is none to go on from."""
        journal = self.folder / JOURNAL
        if not journal.is_file():
            return False
        content = journal.read_bytes()
        # A line that was cut short counts for nothing, and what follows must begin a line.
        whole = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            return False
        began = lines[0]["request"]
        if began != request:
            differs = [key for key in request if began.get(key) != request[key]]
            raise ValueError(
                f"{self.folder} was begun by a conversion that differs in {', '.join(differs)}: remove it, "
                "or name another --output"
            )
        # Else the next line would join the one that was cut short.
        os.truncate(journal, len(whole))
        self.done = {line["group"]: line["tensors"] for line in lines[1:]}
        return True

    def _lay_out(self, request: dict[str, Any]) -> None:
        # Left by a conversion that died before it had written anything.
        for path in self.folder.iterdir():
            path.unlink()
        needed, free = sum(plan.size for plan in self.plans.values()), shutil.disk_usage(self.folder).free
        # The files are sparse until they are filled: the disk itself would say so hours later.
        if needed > free:
            raise ValueError(
                f"{self.output} needs {needed:,} bytes, {free:,} are free there: make room, or name another "
                "--output"
            )
        for name, plan in self.plans.items():
            with (self.folder / name).open("wb") as file:
                try:
                    file.truncate(plan.size)
                except OSError as error:
                    raise OSError(
                        f"{file.name} needs {plan.size:,} bytes and cannot have them ({error.strerror}); "
                        "name another --output, or raise the limit"
                    ) from error
                for offset, data in plan.frames:
                    file.seek(offset)
                    file.write(data)
        self._enter({"request": request})

    def _enter(self, line: dict[str, Any]) -> None:
        with (self.folder / JOURNAL).open("ab") as journal:
            journal.write(json.dumps(line).encode() + b"\n")
            journal.flush()
            os.fsync(journal.fileno())


def _open(path: Path, flags: int, opened: ExitStack) -> int:
    descriptor = os.open(path, flags)
    opened.callback(os.close, descriptor)
    return descriptor
