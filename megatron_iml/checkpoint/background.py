"""Writes a rank's part of a checkpoint from a process of its own, while training goes on.

What enters: megatron-core's plan of what this rank writes. What leaves: up to two files a rank, weights apart
from optimizer state (who loads weights only reads and verifies those alone), and their digests.

The files are torch's distributed checkpoint format, planned and described by megatron-core. Three things of
its own writer are different here. It collects results through a server process that outlives a killed run and
takes seconds to start; here the writing process leaves them in a file that both sides hold open. It waits for
ever for a writer that died; here that is an error with a rank in it. And it says on one rank only what went
wrong.
"""

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_iml.data.files import HashingFile
from megatron_iml.training.agree import agreed_failure

from .record import StoredFile
from .staging import Gate, Staging

Bucket = tuple[str, str, tuple[list[Any], list[tuple[WriteItem, torch.Tensor]]]]
"""megatron-core's shape of a file to write: path, name, (objects, tensors)."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, for a reason outside of the run, which every rank has heard."""


class Outcome:
    """What the writing process tells the one that trains, through a file that both hold open."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.gate = Gate()
        # Without a name: whoever is killed, nothing stays on the disk.
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def tell(self, results: list[WriteResult], files: dict[str, StoredFile], error: str | None) -> None:
        """Leave the end of the story."""
        pickle.dump((results, files, error), self.file)
        self.file.flush()

    def hear(self) -> tuple[list[WriteResult], dict[str, StoredFile], str | None]:
        """What was left; called when the writing process has ended."""
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except (EOFError, pickle.UnpicklingError):
            return [], {}, "the process that writes was killed"


class Writer(FileSystemWriterAsync):
    """One rank's files of one checkpoint."""

    def __init__(self, folder: Path | str, staging: Staging | None) -> None:
        super().__init__(folder)
        self.outcome = Outcome()
        self.staging = staging

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Sort what this rank writes into its files."""
        # Not megatron-core's split by size: who loads weights alone need not read or verify the rest.
        kinds: dict[str, tuple[list[Any], list[Any]]] = {"weights": ([], []), "optimizer": ([], [])}
        for item in plan.items:
            kind = "optimizer" if item.index.fqn.startswith("optimizer.") else "weights"
            data = planner.resolve_data(item)
            is_tensor = isinstance(data, torch.Tensor)
            # Detached: staging copies outside of no_grad, where a parameter's copy would join a graph.
            kinds[kind][is_tensor].append((item, data.detach() if is_tensor else data))
        names = {kind: f"{kind}_{dist.get_rank():05d}.distcp" for kind in kinds}
        self.write_buckets = [
            (str(Path(self.checkpoint_dir) / names[kind]), names[kind], data)
            for kind, data in kinds.items()
            if any(data)
        ]

    def request(self, metadata: Metadata | None, heard: dict[str, StoredFile]) -> AsyncRequest:
        """The work in the background, and what follows it on every rank; `heard` gets every file's digest."""

        def finish() -> None:
            """Hear from the writers; rank 0 then writes the metadata of all."""
            # A rank without a file of its own has started no process and has heard nothing.
            results, files, error = self.outcome.hear() if self.write_buckets else ([], {}, None)
            reports: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((results, files), reports)
            # After the gather: ranks that raised before it would leave rank 0 waiting.
            raise_agreed(error)
            # Agreed on as well: alone with an error rank 0 would leave the others in the barrier that
            # megatron-core's own finalize function comes to.
            on_rank_zero(lambda: self.describe(metadata, reports, heard))

        arguments = (dist.get_rank(), self.write_buckets, self.outcome)
        return AsyncRequest(
            write_files if self.write_buckets else None,
            arguments,
            [finish],
            # Called before the process is forked, which must not touch a GPU.
            preload_fn=self.staged_buckets if self.staging is not None else None,
        )

    def describe(
        self, metadata: Metadata | None, reports: list[Any] | None, heard: dict[str, StoredFile]
    ) -> None:
        """Rank 0: write `.metadata`, which says where every rank has put what; `heard` gets the digests."""
        assert metadata is not None and reports is not None, "rank 0 has planned and gathered"
        self.finish(metadata, [results for results, _ in reports])
        heard.update({name: file for _, files in reports for name, file in files.items()})

    def staged_buckets(self) -> list[Bucket]:
        """The same with every tensor where the process that writes can read it, once its gate is open."""
        assert self.staging is not None, "a save that is waited for needs no staging"
        items = [item for _, _, (_, items) in self.write_buckets for item in items]
        placed = iter(self.staging.place([tensor for _, tensor in items]))
        return [
            (path, name, (objects, [(item, next(placed)) for item, _ in items]))
            for path, name, (objects, items) in self.write_buckets
        ]


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's format and planning with `Writer` for the files."""

    def __init__(self, staging: Staging | None) -> None:
        # What metadata.json is going to say, by which megatron-core finds the code that reads.
        super().__init__("torch_dist", 1)
        self.staging = staging
        self.gate: Gate | None = None
        """What the process that writes waits behind, when the save is planned."""
        self.files: dict[str, StoredFile] = {}

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        """Plan the save together with the other ranks; nothing is written yet."""
        # True: of what replicas share, only what this rank has been chosen to write.
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        writer = Writer(checkpoint_dir, self.staging)
        self.gate = writer.outcome.gate
        # Flat already; and with torch's own flattening rank 0 would have to plan for everybody.
        planner = MCoreSavePlanner(flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key), writer, None, 0, planner=planner
        )
        # (writer, metadata of the whole on rank 0 and None elsewhere, torch's groups)
        return writer.request(planned[1], self.files)


def write_files(rank: int, buckets: list[Bucket], outcome: Outcome) -> None:
    """Write a rank's files and tell how it went; in a forked process, or in a save that is waited for."""
    if os.getpid() != outcome.owner:
        # OpenMP's threads stayed with the process that trains: a copy shared out among them would never end.
        torch.set_num_threads(1)
        # The launcher that stops a job signals this process too, and the last checkpoint is what it waits
        # for.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if not outcome.gate.wait():
            raise SystemExit(1)
    results: list[WriteResult] = []
    files: dict[str, StoredFile] = {}
    error = None
    try:
        for path, name, (objects, tensors) in buckets:
            results += _write_file(HashingFile(Path(path)), name, [*objects, *tensors], files, outcome)
    # torch.save turns what the file raised into a RuntimeError about its own position.
    except (OSError, RuntimeError) as failure:
        cause = failure.__context__ if isinstance(failure.__context__, OSError) else failure
        error = f"{name}: {cause}"
    outcome.tell(results, files, error)


def _write_file(
    stream: HashingFile, name: str, items: list[Any], files: dict[str, StoredFile], outcome: Outcome
) -> list[WriteResult]:
    results = []
    for item, data in items:
        # Nobody waits for this file any more: the run was killed.
        if os.getpid() != outcome.owner and os.getppid() != outcome.owner:
            raise SystemExit(1)
        if isinstance(data, torch.Tensor):
            # In a save that is waited for it may still be on the device: one at a time needs little memory.
            data = data.cpu()
            if data.untyped_storage().nbytes() != data.nbytes:
                # torch.save writes the whole storage that a view is of.
                data = data.clone()
        start = stream.tell()
        if isinstance(data, torch.Tensor):
            # Of a file torch wants `write` and `flush`.
            torch.save(data, cast(IO[bytes], stream))
        else:
            # megatron-core has pickled objects into a BytesIO when it planned.
            stream.write(data.getbuffer())
        length = stream.tell() - start
        results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
    size = stream.tell()
    files[name] = StoredFile(size, stream.close())
    return results


def raise_agreed(error: str | None) -> None:
    """Raise SaveFailed on every rank if one of them has an error; a collective."""
    failure = agreed_failure(error)
    if failure is not None:
        raise SaveFailed(failure)


def on_rank_zero(action: Callable[[], None]) -> None:
    """Run on rank 0; what the file system refuses there is a SaveFailed everywhere. A collective."""
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as failure:
            error = str(failure)
    raise_agreed(error)
