"""Host memory that a save copies a device's tensors to, while training goes on.

    staging.reserve(tensors)          once, before training: making and pinning memory takes seconds
    views = staging.place(tensors)    where each is going to be; nothing is copied yet
    staging.begin()                   the device copies, beside the next step's forward and backward
    staging.settle()                  before anything that is being copied changes: before the next update

The memory is shared with the process that writes, which is forked before the copies begin and waits until
they are done. So neither the copies nor the fork holds training up: at 25 GB/s the 47 GB that a rank of
OPT-6.7B saves with two replicas take two seconds, and a forward and backward longer than that.

What lies on the host already is not copied: a forked process has it as it was at the fork.
"""

import atexit
import mmap
import os
import select
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

# The device's own allocator aligns to as much.
ALIGNMENT = 256
# The smallest page there is; where pages are larger, some are touched more than once.
PAGE_BYTES = 4096
TOUCHING_THREADS = 8


class Gate:
    """Keeps the process that writes waiting until what it writes is there."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.waits, self.opens = os.pipe()

    def open(self) -> None:
        """Let it pass."""
        os.write(self.opens, b"1")

    def wait(self) -> bool:
        """Called there: True when it is opened, False if that will never be."""
        # Else this process would keep its own pipe from ending.
        self.close()
        # Half a second, in milliseconds: how long a process may stay behind when its run was killed.
        poll = select.poll()
        poll.register(self.waits, select.POLLIN)
        while not poll.poll(500):
            # Another child of a run that died may still hold the other end.
            if os.getppid() != self.owner:
                return False
        # Nothing to read is the end of the pipe: nobody holds the other end open any more.
        return os.read(self.waits, 1) == b"1"

    def close(self) -> None:
        """Open it no more."""
        if self.opens >= 0:
            os.close(self.opens)
            self.opens = -1

    def __del__(self) -> None:
        self.close()
        # Not before: `open` must not meet a broken pipe where the process that waits has died.
        os.close(self.waits)


class Staging:
    """One rank's memory for the tensors of one save at a time."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | None = None
        self.size = 0
        self.pinned = False
        self.stream: torch.cuda.Stream | None = None
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.gate: Gate | None = None

    def must_copy(self, tensor: Tensor) -> bool:
        """Whether the process that writes could not read it where it is."""
        return tensor.device.type != "cpu"

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Make room for these."""
        # Placed one behind the other, each at a multiple that any type and the copy engine like.
        needed = sum(_aligned(tensor.nbytes) for tensor in tensors if self.must_copy(tensor))
        if needed <= self.size:
            return
        if self.pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._address()))
        # Without a file, shared with processes forked later. Private memory would be copied on the first
        # write after a fork, away from where the device writes to.
        self.memory, self.size = mmap.mmap(-1, needed), needed
        pages = np.frombuffer(self.memory, dtype=np.uint8)[::PAGE_BYTES]
        # The system makes a page when it is first touched; one thread would take many seconds for all.
        with ThreadPoolExecutor(TOUCHING_THREADS) as threads:
            list(threads.map(lambda part: part.fill(0), np.array_split(pages, TOUCHING_THREADS)))
        # Pageable memory is copied to through a buffer of the driver's, at a tenth of the speed, and the
        # calls would wait for it.
        if torch.cuda.is_available():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._address(), needed, 0))
            self.pinned = True

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of this memory, one for each tensor that must be copied; the others themselves."""
        assert not self.copies, "one save at a time"
        self.reserve(tensors)
        placed, end = [], 0
        for tensor in tensors:
            if self.must_copy(tensor):
                assert self.memory is not None, "reserved above"
                flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=end)
                end += _aligned(tensor.nbytes)
                self.copies.append((flat.view(tensor.shape), tensor))
                placed.append(self.copies[-1][0])
            else:
                placed.append(tensor)
        return placed

    def begin(self, gate: Gate) -> None:
        """Start copying what was placed; `gate` is opened by `settle`, or now if there is nothing to copy."""
        self.gate = gate
        # A run that fails before its next update ends, and so must the process that it waits for at exit.
        # multiprocessing waits in an exit function too: registered earlier, it comes after this one.
        atexit.register(gate.close)
        if not self.copies:
            self.settle()
            return
        if self.stream is None:
            # Without CUDA the adapter's stand-in: then the copies are done when they return.
            self.stream = torch.cuda.Stream() if torch.cuda.is_available() else torch.cuda.current_stream()
        # Behind the update that has made these values.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for ours, theirs in self.copies:
                ours.copy_(theirs, non_blocking=True)

    def settle(self) -> None:
        """Wait until everything is copied; from then on the tensors may change."""
        if self.gate is None:
            return
        if self.stream is not None:
            self.stream.synchronize()
        self.copies = []
        self.gate.open()
        atexit.unregister(self.gate.close)
        self.gate = None

    def _address(self) -> int:
        assert self.memory is not None, "nothing is reserved"
        return torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
