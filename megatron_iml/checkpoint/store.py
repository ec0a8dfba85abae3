"""Native checkpoints: written in the background, complete or absent, loadable under any layout.

    checkpoints/
      iter_0000100/               megatron-core's distributed format: weights, fp32 master weights, Adam
      moments
        complete.json             written last: step, rows consumed, resolved config, fingerprints, versions
      latest_checkpointed_iteration.txt

What enters: the engine and a `RunState`. What leaves: files; later, the same numbers bit for bit, under
another tensor, pipeline or data parallel size if wanted. A folder without complete.json does not exist for a
reader.
"""

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as engine_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.filesystem_async import _get_write_results_queue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

from megatron_iml.config import Config, ModelConfig
from megatron_iml.model.opt import OPTModel
from megatron_iml.training.engine import Engine

FORMAT_VERSION = 1
SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors to go on: everything else is a function of these."""

    step: int
    """Optimizer steps taken."""
    rows_consumed: int
    """Rows of the plan trained on: the loader's whole state."""
    plan_fingerprint: str
    tokenizer_sha256: str = ""
    """Of the corpus trained on; empty for weights that no training of ours has touched."""


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, keep_last: int, asynchronous: bool) -> None:
        self.directory, self.keep_last, self.asynchronous = directory, keep_last, asynchronous
        # Not persistent: megatron-core's persistent worker needs CUDA and dies without it.
        self.queue = AsyncCallsQueue(persistent=False)

    def save(self, engine: Engine, state: RunState) -> Path:
        """Start writing a checkpoint; with `asynchronous` the files follow while training goes on.

        Raises:
            RuntimeError: if the state about to be written disagrees with the model's weights.
        """
        # One at a time: megatron-core gathers all write results through one queue.
        self.wait()
        _start_results_process()
        folder = self.directory / f"iter_{state.step:07d}"
        if dist.get_rank() == 0:
            # What a killed run left half written would otherwise mix with the new files.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        # Nobody writes before rank 0 has emptied the folder.
        dist.barrier()
        engine.gather_weights()
        tensors = _sharded_state(engine, is_loading=False)
        check_master_weights(tensors)
        # Replicas share the writing; else data rank 0 would write every weight alone.
        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist"), engine.layout.groups.dp
        )
        request = dist_checkpointing.save(
            tensors, str(folder), strategy, async_sharded_save=self.asynchronous, content_metadata=_sharding()
        )
        finish = self._finisher(folder, engine.config, state)
        if request is None:
            # Then a barrier: no rank goes on while rank 0 still marks the checkpoint complete.
            finish()
            dist.barrier()
        else:
            # Runs last, after the metadata that makes the files readable.
            request.add_finalize_fn(finish)
            self.queue.schedule_async_request(request)
        return folder

    def poll(self) -> None:
        """Complete a background save if its files are there; call on every rank after each step."""
        self.queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Block until the background save is complete."""
        self.queue.maybe_finalize_async_calls(blocking=True)

    def _finisher(self, folder: Path, config: Config, state: RunState) -> Callable[[], None]:
        """Runs after megatron-core's own metadata is written: mark complete, point to it, drop old ones."""

        def finish() -> None:
            """Rank 0 speaks for all: its marker makes the checkpoint whole."""
            if dist.get_rank() != 0:
                return
            record = {
                "format_version": FORMAT_VERSION,
                "state": dataclasses.asdict(state),
                "config": dataclasses.asdict(config),
                "versions": {"torch": torch.__version__, "megatron_core": engine_version},
            }
            _write_atomically(folder / "complete.json", json.dumps(record, indent=1))
            _write_atomically(self.directory / "latest_checkpointed_iteration.txt", str(state.step))
            for old in complete_checkpoints(self.directory)[: -self.keep_last]:
                # The marker first: a removal that is killed half way must not leave a complete one.
                (old / "complete.json").unlink()
                shutil.rmtree(old)

        return finish


def _start_results_process() -> None:
    """Start the process that megatron-core collects write results through, deaf to stop signals.

    A launcher that stops a job signals all its processes. The ranks then save a last time; without this they
    would find that process dead and lose the checkpoint.
    """
    # multiprocessing starts its resource tracker on first use and then unblocks SIGTERM: let it do so before.
    resource_tracker.ensure_running()
    # A blocked signal stays blocked in what is started now; here it waits and is delivered afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        _get_write_results_queue()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(marker.parent for marker in directory.glob("iter_*/complete.json"))


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it; a collective, the same path on every rank."""
    # Shared file systems show new files to other nodes late: ranks that each looked could load two steps.
    found = complete_checkpoints(directory)
    names = [found[-1].name if found else None]
    dist.broadcast_object_list(names, src=0)
    return None if names[0] is None else directory / names[0]


def read_record(folder: Path) -> dict[str, Any]:
    """What complete.json says.

    Raises:
        FileNotFoundError: if the checkpoint is not there or not complete.
    """
    marker = folder / "complete.json"
    if not marker.is_file():
        raise FileNotFoundError(
            f"{folder} is no complete checkpoint: it has no complete.json, which is written last; "
            f"complete ones beside it: "
            f"{[path.name for path in complete_checkpoints(folder.parent)] or 'none'}"
        )
    record: dict[str, Any] = json.loads(marker.read_text())
    if record["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {record['format_version']}, this version reads "
            f"{FORMAT_VERSION}: "
            "convert it with the version that wrote it"
        )
    return record


def load_run(folder: Path, engine: Engine) -> RunState:
    """Fill weights, master weights and moments from a checkpoint of this or another layout."""
    record = read_record(folder)
    check_same_shape(folder, record["config"]["model"], engine.config.model)
    tensors = dist_checkpointing.load(_sharded_state(engine, is_loading=True), str(folder))
    _load_chunks(engine.chunks, tensors)
    engine.optimizer.load_state_dict(tensors["optimizer"])
    return RunState(**record["state"])


def load_weights(folder: Path, chunks: Sequence[OPTModel], model: ModelConfig) -> None:
    """Fill weights only, under any layout."""
    record = read_record(folder)
    check_same_shape(folder, record["config"]["model"], model)
    _load_chunks(chunks, dist_checkpointing.load(_sharded_chunks(chunks), str(folder)))


def check_same_shape(folder: Path, theirs: dict[str, Any], ours: ModelConfig) -> None:
    """Refuse a checkpoint of another model size, naming every difference."""
    wrong = [
        f"{name} {vars(ours)[name]} here, {theirs[name]} there"
        for name in SHAPE_FIELDS
        if vars(ours)[name] != theirs[name]
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} is a model of another size: {'; '.join(wrong)}. "
            "Set the model section (or model.size) to the checkpoint's, or name another checkpoint"
        )


def check_master_weights(tensors: dict[str, Any]) -> None:
    """Compare the fp32 weights about to be written with the model's own, slice by slice.

    megatron-core 0.16.1 can gather them shifted (see training/optimizer.py); nothing that reads the files
    with the same code would notice.
    """
    weights, masters = {}, {}
    # The name megatron-core gives the fp32 masters in `fully_reshardable` form.
    prefix = "optimizer.state.param."
    for tensor in nested_values(tensors):
        if isinstance(tensor, ShardedTensor):
            place = (tensor.key.removeprefix(prefix), tensor.global_offset)
            if tensor.key.startswith(prefix):
                masters[place] = tensor.data
            elif not tensor.key.startswith("optimizer."):
                weights[place] = tensor.data
    wrong = [
        place[0]
        for place, master in masters.items()
        if not torch.equal(master.to(weights[place].dtype).cpu(), weights[place].detach().cpu())
    ]
    if wrong:
        raise RuntimeError(
            f"rank {dist.get_rank()}: the master weights gathered for saving differ from the model's in "
            f"{len(wrong)} of "
            f"{len(masters)} tensors, first {wrong[0]}: nothing was written; this is a bug, please report "
            "it with the layout"
        )


def _sharding() -> dict[str, Any]:
    """The form of optimizer state; made anew, since megatron-core writes its process groups into it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def _sharded_chunks(chunks: Sequence[OPTModel]) -> dict[str, Any]:
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=_sharding())
        for name, chunk in zip(names, chunks, strict=True)
    }


def _sharded_state(engine: Engine, is_loading: bool) -> dict[str, Any]:
    chunks = _sharded_chunks(engine.chunks)
    weights = chunks["model"] if len(chunks) == 1 else chunks
    optimizer = engine.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_sharding())
    return {**chunks, "optimizer": optimizer}


def _load_chunks(chunks: Sequence[OPTModel], tensors: dict[str, Any]) -> None:
    for name, chunk in zip(_sharded_chunks(chunks), chunks, strict=True):
        chunk.load_state_dict(tensors[name])


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    # A rename is whole or not at all; a half written marker would count as complete.
    temporary.replace(path)
