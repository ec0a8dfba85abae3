"""A checkpoint, opened for evaluation on all ranks of the job.

What enters: a config and where the weights are. What leaves: a model that scores and generates, its
tokenizer, its fingerprint, and this process's place among the replicas. The layout is tensor x data, whatever
the training's was: checkpoints load under any, and a pipeline would wait for itself at every generated token.

    with open_model(config, "runs/demo/checkpoints/iter_0000400") as opened:
        opened.model.target_losses(row)

`start` in place of a folder means the weights that training starts from: checkpoint.initial_weights, or
random ones. Its evaluation is the baseline that shows what training changed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_iml.checkpoint.conversion.formats import is_foreign
from megatron_iml.checkpoint.record import read_record
from megatron_iml.checkpoint.weights import fill_weights
from megatron_iml.config import Config, ParallelConfig, check_layout
from megatron_iml.data.corpus.tokenizer import Tokenizer
from megatron_iml.evaluation.replicas import Replicas
from megatron_iml.model.build import build_model
from megatron_iml.model.inference import InferenceModel
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import (
    Layout,
    start_distributed,
    stop_distributed,
    world_size_from_environment,
)

START = "start"
SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenedModel:
    """What an evaluation needs of a checkpoint."""

    model: InferenceModel
    tokenizer: Tokenizer
    replicas: Replicas
    fingerprint: str


@contextmanager
def open_model(config: Config, checkpoint: str) -> Iterator[OpenedModel]:
    """Join the world, load the weights, leave the world at the end.

    Args:
        config: as for training; of its parallel section only the tensor size counts.
        checkpoint: a native or Hugging Face folder, or `start`.

    Raises:
        ValueError: a layout, model shape, tokenizer or prefix that does not fit the checkpoint.
        FileNotFoundError: no checkpoint or tokenizer there.
    """
    config = _inference_config(config)
    check_layout(config, world_size_from_environment())
    # Before the processes find one another: mistakes are said without a wait.
    tokenizer = _load_tokenizer(config)
    folder = _weights_folder(config, checkpoint)
    # Read by every rank on its own, before there are groups: small JSON files.
    if folder is not None and not is_foreign(folder):
        # Other formats do not say what their prefix and tokenizer are; our own checkpoints do.
        _check_prefix(config, folder)
        _check_tokenizer(config, folder, tokenizer)
    layout = start_distributed(config)
    try:
        # One chunk: without a pipeline a rank has the whole depth.
        chunks = build_model(config, layout)
        if folder is None:
            initialise(chunks, config.model, config.training.seed, layout)
        else:
            fill_weights(folder, chunks, config.model, layout)
        # The table's, whatever the row length: generation reads no rows of that length.
        positions = config.model.max_position_embeddings
        model = InferenceModel(chunks[0], layout, tokenizer.vocab_size, positions)
        yield OpenedModel(model, tokenizer, replicas_of(layout), fingerprint_weights(config, folder))
    finally:
        # After an error too, or the other ranks would wait for the timeout.
        stop_distributed()


def replicas_of(layout: Layout) -> Replicas:
    """This rank among the data-parallel replicas; rank 0 of the job writes."""

    def gather(mine: Any) -> list[Any]:
        """What every replica has, in the order of replicas."""
        everyone: list[Any] = [None] * layout.data_size
        # Over replicas alone: the tensor ranks of one replica hold the same answers.
        dist.all_gather_object(everyone, mine, group=layout.groups.dp)
        return everyone

    def broadcast(mine: Any) -> Any:
        """Rank 0's."""
        box = [mine]
        # To tensor ranks as well: those that skipped other tasks would wait in collectives of their own.
        dist.broadcast_object_list(box, src=0)
        return box[0]

    return Replicas(layout.data_rank, layout.data_size, gather, broadcast, writes=layout.rank == 0)


def fingerprint_weights(config: Config, folder: Path | None) -> str:
    """SHA-256 over names, sizes and three samples of each file, or over what random weights follow from.

    Whole files would take an hour at 175B. A training step moves every weight, so that the first, middle and
    last MiB of a file cannot stay as they are.
    """
    digest = hashlib.sha256()
    if folder is None:
        # Not the layout: random weights are alike under each. The precision is a condition of its own.
        digest.update(repr((asdict(config.model), config.training.seed)).encode())
        return digest.hexdigest()
    # metaseq's weights may be one file, and a glob below a file finds nothing: all of them would be alike.
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            # The ends hold headers and the last tensors, the middle a weight of some layer.
            for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _inference_config(config: Config) -> Config:
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size: got {parallel.pipeline_model_parallel_size}; allowed: 1 "
            "in evaluation; set it to 1 and raise parallel.tensor_model_parallel_size: any checkpoint loads"
        )
    if config.model.attention_backend == "flash":
        raise ValueError(
            "model.attention_backend: got flash; allowed: triton or reference in evaluation, where "
            "candidates share the prefix of their prompt; set model.attention_backend=null"
        )
    # Sequence parallelism, recompute and overlaps belong to training and change no score.
    ours = ParallelConfig(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    return replace(config, parallel=ours)


def _load_tokenizer(config: Config) -> Tokenizer:
    if config.evaluation.tokenizer is None:
        raise ValueError(
            "evaluation.tokenizer: got none; allowed: a folder with vocab.json and merges.txt; set it"
        )
    tokenizer = Tokenizer.load(Path(config.evaluation.tokenizer))
    # Smaller is right: the embedding is padded to a multiple of 8 and more, and those rows are never chosen.
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: got {config.model.vocab_size}; allowed: at least the tokenizer's "
            f"{tokenizer.vocab_size} entries; set evaluation.tokenizer to the one the model was trained with"
        )
    return tokenizer


def _weights_folder(config: Config, checkpoint: str) -> Path | None:
    """The folder to load from; None means random weights."""
    if checkpoint != START:
        return Path(checkpoint)
    if config.checkpoint.initial_weights is not None:
        return Path(config.checkpoint.initial_weights)
    if config.model.initialisation is None:
        raise ValueError(
            "--checkpoint start: got neither checkpoint.initial_weights nor model.initialisation; set one of "
            "them, or name a checkpoint folder"
        )
    return None


def _check_prefix(config: Config, folder: Path) -> None:
    # Refused and not taken over: the config says how it is asked, and the report quotes the config.
    theirs = read_record(folder).config["model"]["inference_prefix"]
    if theirs != config.model.inference_prefix:
        raise ValueError(
            f"model.inference_prefix: got {config.model.inference_prefix}; allowed: {theirs}, which the "
            f"checkpoint {folder} was made for; set model.inference_prefix={theirs}"
        )


def _check_tokenizer(config: Config, folder: Path, tokenizer: Tokenizer) -> None:
    theirs = read_record(folder).state.tokenizer_sha256
    # Another vocabulary of the same size would give every prompt other words, and a score without a warning.
    if theirs and theirs != tokenizer.sha256:
        raise ValueError(
            f"evaluation.tokenizer: got {config.evaluation.tokenizer} with SHA-256 {tokenizer.sha256}; "
            f"allowed: {theirs}, which the corpus of checkpoint {folder} was made with; name that one"
        )
