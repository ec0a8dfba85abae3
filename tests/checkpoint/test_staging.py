"""The memory that saves are copied to, and the gate before the process that writes it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import CPU_ENVIRONMENT

from megatron_iml.checkpoint.staging import Gate, Staging
from megatron_iml.parallel.cpu_adapter import install_cpu_adapter

FORK = multiprocessing.get_context("fork")


class Host(Staging):
    """Copies what is on the host too."""

    def must_copy(self, tensor: torch.Tensor) -> bool:
        return True


def test_places_are_apart_and_are_filled() -> None:
    tensors = [torch.arange(5, dtype=torch.bfloat16), torch.tensor(2.5), torch.arange(12.0).view(3, 4)[1:]]
    staging = Host()
    install_cpu_adapter()
    for round_number in range(2):
        views = staging.place([tensor + round_number for tensor in tensors])
        starts = [view.data_ptr() - views[0].data_ptr() for view in views]
        assert starts == [0, 256, 512] and staging.size == 768
        assert [view.untyped_storage().nbytes() for view in views] == [tensor.nbytes for tensor in tensors]
        staging.begin(Gate())
        staging.settle()
        assert all(torch.equal(a, b + round_number) for a, b in zip(views, tensors, strict=True))


def test_what_is_on_the_host_stays_where_it_is() -> None:
    tensor, staging = torch.zeros(3), Staging()
    assert staging.place([tensor])[0] is tensor and staging.memory is None


@pytest.fixture
def waiting() -> Iterator[tuple[Gate, multiprocessing.process.BaseProcess]]:
    """A gate and a process behind it, which ends with 1 if it may pass and with 2 if it never will."""
    gate = Gate()
    process = FORK.Process(target=lambda: sys.exit(1 if gate.wait() else 2))
    process.start()
    yield gate, process
    process.kill()


def test_a_gate_opens_or_never_will(waiting: tuple[Gate, multiprocessing.process.BaseProcess]) -> None:
    gate, process = waiting
    process.join(0.2)
    assert process.exitcode is None, "nobody has opened it"
    gate.open()
    process.join(10)
    assert process.exitcode == 1


def test_a_closed_gate_never_opens(waiting: tuple[Gate, multiprocessing.process.BaseProcess]) -> None:
    gate, process = waiting
    gate.close()
    process.join(10)
    assert process.exitcode == 2


def wait_behind(gate: Gate, said: Path) -> None:
    said.with_suffix(".tmp").write_text(str(gate.wait()))
    said.with_suffix(".tmp").rename(said)


def run_that_is_killed(gate: Gate, said: Path) -> None:
    gate.owner = os.getpid()
    FORK.Process(target=wait_behind, args=(gate, said)).start()
    os.kill(os.getpid(), signal.SIGKILL)


def test_who_waits_for_a_run_that_was_killed_goes_on_to_its_end(tmp_path: Path) -> None:
    """Though another process, this one, still holds the end that would open the gate."""
    gate, said = Gate(), tmp_path / "said"
    FORK.Process(target=run_that_is_killed, args=(gate, said)).start()
    deadline = time.monotonic() + 20
    while not said.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert said.read_text() == "False"


FAILING_RUN = """
import multiprocessing, sys, unittest.mock, torch
from megatron_iml.checkpoint.staging import Gate, Staging
torch.cuda.current_stream = torch.cuda.stream = unittest.mock.MagicMock()
Staging.must_copy = lambda self, tensor: True
staging, gate = Staging(), Gate()
staging.place([torch.zeros(1)])
multiprocessing.get_context("fork").Process(target=lambda: sys.exit(not gate.wait())).start()
staging.begin(gate)
raise FloatingPointError("diverged")
"""


def test_a_run_that_fails_before_its_update_ends() -> None:
    """The interpreter waits for its children at exit, and one of them waits for the run."""
    command = [sys.executable, "-c", FAILING_RUN]
    done = subprocess.run(command, env=CPU_ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "FloatingPointError: diverged"
