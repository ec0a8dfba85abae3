"""The checkpoints of a run: written in the background, complete or absent, kept or dropped.

    store = CheckpointStore(Path("run/checkpoints"), config.checkpoint)
    store.reserve(engine)                                                              before training
    store.save(engine, RunState(100, 6400, plan, corpus), {"fully_held_out": 2.9})     begins iter_0000100
    store.before_update()                                                              in every step
    store.poll()                                                                       after every step
    store.wait()                                                                       before leaving

What enters: the engine and a `RunState`. What leaves: a folder (record.py says what is in it) that gets its
name by one rename, when every file is on the disk: whatever moment the writer dies at, a reader finds the
checkpoint whole or not at all. Every method but `before_update` is a collective; those that may have
something to say return lines for the console.

A save that the file system refuses leaves older checkpoints as they are, and training goes on: a full disk at
step 100 is no reason to lose the steps since. The second such failure in a row ends the run, and so does one
of the last save.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_iml.config import CheckpointConfig, Config
from megatron_iml.data.files import force_to_disk, write_atomically
from megatron_iml.training.agree import agreed_failure
from megatron_iml.training.engine import Engine

from .background import SaveFailed, SaveStrategy, on_rank_zero
from .record import (
    MARKER,
    Record,
    RunState,
    StoredFile,
    complete_checkpoints,
    describe_file,
    now,
    step_of,
    write_record,
)
from .retention import PARTIAL, Remover, drop_old, strangers, sweep
from .sharded import master_weights_problem, owned_bytes, sharded_state, sharded_tensors, sharding
from .staging import Staging
from .versions import versions

LATEST = "latest_checkpointed_iteration.txt"
"""Under Megatron-LM's name: for people and other tools, nothing here reads it."""
PROBE_BYTES = 1 << 16
"""More than common.pt has, whatever the model: step counts and settings, no tensors."""


@dataclass
class Save:
    """A save under way."""

    folder: Path
    """The name it gets when it is complete."""
    staging: Path
    """Where it is written: a name of its own, which no other try and no reader looks at."""
    state: RunState
    validation: Mapping[str, float]
    began: float
    waited_seconds: float = 0.0
    """How long training stood still for it."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, options: CheckpointConfig) -> None:
        self.directory, self.options = directory, options
        # Not persistent: megatron-core's persistent worker needs CUDA and dies without it.
        self.queue = AsyncCallsQueue(persistent=False)
        self.staging = Staging()
        self.remover = Remover()
        self.under_way: Save | None = None
        self.failure: SaveFailed | None = None
        self.lines: list[str] = []

    def tidy(self) -> list[str]:
        """Once, before training: delete what runs that died have left, and point to the newest checkpoint."""
        lines: list[str] = []
        if dist.get_rank() == 0:
            if removed := sweep(self.directory):
                lines.append(f"removed what a run that died has left: {', '.join(removed)}")
            if unknown := strangers(self.directory):
                lines.append(
                    f"left alone: {', '.join(unknown)} in {self.directory}, without {MARKER}; a save of such "
                    "a step will be refused: move them"
                )
            if found := complete_checkpoints(self.directory):
                # A run can die between the checkpoint and the pointer to it.
                write_atomically(self.directory / LATEST, str(step_of(found[-1])).encode())
        said = [lines]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def reserve(self, engine: Engine) -> None:
        """Get the host memory that background saves copy a device's state to; seconds, which no save then
        takes."""
        tensors = sharded_tensors(sharded_state(engine, is_loading=False))
        # All ranks have one kind of device, so they agree on whether the collective below comes.
        copies = any(self.staging.must_copy(tensor.data) for tensor in tensors)
        if not self.options.asynchronous or not copies:
            return
        sharing = _share_among_replicas(SaveStrategy(self.staging), engine)
        # Marks the tensors that this rank is going to write.
        sharing.apply_saving_parallelization(dict(enumerate(tensors)))
        self.staging.reserve([tensor.data for tensor in tensors if is_main_replica(tensor.replica_id)])

    def save(self, engine: Engine, state: RunState, validation: Mapping[str, float]) -> list[str]:
        """Start writing a checkpoint; with `asynchronous` the files follow while training goes on.

        Raises:
            RuntimeError: if the state about to be written disagrees with the model's weights.
            SaveFailed: if this is the second failure in a row.
        """
        # One at a time: two would hold the run's state in memory twice.
        self._attempt(lambda: self._finish(blocking=True))
        self._attempt(lambda: self._begin(engine, state, validation))
        return self._said()

    def before_update(self) -> None:
        """What a background save is still copying from the device must not change: wait for that."""
        began = time.perf_counter()
        self.staging.settle()
        if self.under_way is not None:
            self.under_way.waited_seconds += time.perf_counter() - began

    def poll(self) -> list[str]:
        """Complete a background save if its files are there; call on every rank after each step."""
        self._attempt(lambda: self._finish(blocking=False))
        return self._said()

    def wait(self) -> list[str]:
        """Block until the background save is complete.

        Raises:
            SaveFailed: if the last save of the run is not there: nobody will try again.
        """
        self._attempt(lambda: self._finish(blocking=True))
        # A failure that a later save has made good is forgotten by then.
        if self.failure is not None:
            raise self.failure
        return self._said()

    def _said(self) -> list[str]:
        said, self.lines = self.lines, []
        return said

    def _attempt(self, action: Callable[[], object]) -> None:
        """Run; forgive a first failure. Every rank has heard of it, so that all of them do the same."""
        try:
            action()
        except SaveFailed as error:
            # A write that is refused names no file.
            failure = SaveFailed(f"{error}; in {self.directory}")
            self._discard()
            if self.failure is not None:
                raise failure from error
            self.failure = failure
            self.lines.append(f"  NOT SAVED: {failure}; training goes on, another failure would end it")

    def _discard(self) -> None:
        """Give back what a failed save has taken of the disk."""
        if self.under_way is not None and dist.get_rank() == 0 and self.under_way.staging.exists():
            self.remover.remove(self.under_way.staging)
        self.under_way = None

    def _finish(self, blocking: bool) -> None:
        if blocking:
            # The process that writes may still wait for its data, and nobody else would send it.
            self.staging.settle()
        self.queue.maybe_finalize_async_calls(blocking=blocking)

    def _begin(self, engine: Engine, state: RunState, validation: Mapping[str, float]) -> None:
        began = time.perf_counter()
        # With an overlapped gather the weights of the last update arrive with the next forward only.
        engine.gather_weights()
        tensors = sharded_state(engine, is_loading=False)
        # Agreed on, since a rank that stopped alone would leave the others waiting for the timeout.
        # Before anything is written: the older checkpoint is still the newest, as it should be then.
        problem = agreed_failure(master_weights_problem(tensors))
        if problem is not None:
            raise RuntimeError(problem)
        self.under_way = save = self._open(state, validation, began)
        # On the device: NCCL sums nothing else.
        needed = torch.tensor([owned_bytes(tensors, engine.layout.data_rank)], device=engine.layout.device)
        # The sum of all ranks: they share one disk, and only rank 0 looks at it.
        dist.all_reduce(needed)
        on_rank_zero(lambda: self._make_room(save, int(needed.item())))
        strategy = SaveStrategy(self.staging if self.options.asynchronous else None)
        # A request in either mode: what is to be done at its end is then said in one place.
        request = dist_checkpointing.save(
            tensors,
            str(save.staging),
            _share_among_replicas(strategy, engine),
            async_sharded_save=True,
            content_metadata=sharding(),
        )
        # Runs last, after the metadata that makes the files readable.
        request.add_finalize_fn(lambda: self._complete(save, engine.config, strategy.files))
        if self.options.asynchronous:
            self.queue.schedule_async_request(request)
            assert strategy.gate is not None, "the save is planned"
            # After the fork: megatron-core waits for the device before it.
            self.staging.begin(strategy.gate)
        else:
            request.execute_sync()
        save.waited_seconds = time.perf_counter() - began

    def _open(self, state: RunState, validation: Mapping[str, float], began: float) -> Save:
        """Choose where to write, the same place on every rank."""
        name = f"iter_{state.step:07d}"
        # What a killed run's last process may still be writing has another name, so it meets nobody.
        staging = [f"{name}.{time.time_ns():x}{PARTIAL}"]
        # Clocks differ between ranks.
        dist.broadcast_object_list(staging, src=0)
        return Save(self.directory / name, self.directory / staging[0], state, validation, began)

    def _make_room(self, save: Save, needed: int) -> None:
        """Rank 0, before anything is written: the folder, and the disk behind it."""
        if save.folder.exists():
            raise FileExistsError(f"{save.folder} is already there, and nothing is overwritten: remove it")
        save.staging.mkdir(parents=True)
        free = shutil.disk_usage(save.staging).free
        # What is made here `_discard` removes again when one of these refuses.
        if free < needed:
            raise OSError(
                f"step {save.state.step} needs {needed / 1e9:.3f} GB, {self.directory} has "
                f"{free / 1e9:.3f} GB free: make room, or lower checkpoint.keep_last"
            )
        # A quota is not in what is free. megatron-core writes its first file on rank 0 alone: refused there,
        # it would leave the others waiting for rank 0 to plan with them.
        probe = save.staging / "probe"
        write_atomically(probe, bytes(PROBE_BYTES))
        probe.unlink()

    def _complete(self, save: Save, config: Config, files: dict[str, StoredFile]) -> None:
        """Runs on every rank after megatron-core's own metadata is written."""
        on_rank_zero(lambda: self._name(save, config, files))
        self.under_way = self.failure = None
        seconds = time.perf_counter() - save.began
        # A save that is waited for comes here before `_begin` has counted: all of it was waiting.
        self.lines.append(
            f"  saved {save.folder} in {seconds:.1f} s, of which training waited {save.waited_seconds:.2f} s"
            if save.waited_seconds
            else f"  saved {save.folder} in {seconds:.1f} s"
        )

    def _name(self, save: Save, config: Config, files: dict[str, StoredFile]) -> None:
        """Rank 0, when every file is on the disk: mark complete, name, point to it, drop old ones."""
        # megatron-core's small files, which nobody has forced to the disk or computed digests of.
        others = [path for path in sorted(save.staging.iterdir()) if path.name not in files]
        for path in others:
            force_to_disk(path)
        record = Record(
            state=save.state,
            config=asdict(config),
            world_size=dist.get_world_size(),
            versions=versions(),
            validation=dict(save.validation),
            saved_at=now(),
            files=files | {path.name: describe_file(path) for path in others},
        )
        write_record(save.staging, record)
        # Entries before the rename, the rename before the pointer: each step outlives a power cut.
        force_to_disk(save.staging)
        save.staging.rename(save.folder)
        force_to_disk(self.directory)
        write_atomically(self.directory / LATEST, str(save.state.step).encode())
        # Last, so that there is always one more than asked for, never one less.
        drop_old(self.directory, self.options, self.remover)


def _share_among_replicas(strategy: SaveStrategy, engine: Engine) -> FullyParallelSaveStrategyWrapper:
    """Let replicas share the writing; else data rank 0 would write every weight alone."""
    return FullyParallelSaveStrategyWrapper(strategy, engine.layout.groups.dp)
