"""A layout proven without its GPUs: any rank's stage is built on meta tensors, counted, and run on one row.

    account = account_of(config, 1023, 1024, num_targets=177)     # the last rank's tensors, buckets, shards
    check_accounts(config, 1024, accounts)      # "parameters: 174,604,468,224, each tensor owned by ..."

The modules, gradient buffers and optimizer shards are the ones that training builds, from the same code; only
collectives and numbers are missing (`parallel/fake_world.py`). A rank takes a quarter of a second and no
memory to speak of.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

from megatron_iml.config import (
    Config,
    data_parallel_size,
    micro_batches_per_step,
    parameter_count,
    place_of_rank,
    rows_per_step,
)
from megatron_iml.config.layout import TARGET_SHARE, Place
from megatron_iml.config.memory import stage_parameters
from megatron_iml.model.head import TargetLosses
from megatron_iml.model.parameters import named_global_parameters, tensor_parallel_dim
from megatron_iml.model.row import MicroBatch, RowContext
from megatron_iml.parallel.fake_world import META, fake_world

from .engine import Engine, build_engine
from .prepare import open_loader


class Tensor(NamedTuple):
    """One parameter as a rank holds it."""

    elements: int
    is_cut: bool
    """Whether tensor ranks hold slices of it, or each the whole."""
    is_copy: bool
    """The last stage's copy of the tied embedding, which the first stage owns."""


class Bucket(NamedTuple):
    """A piece of the gradient buffer that is reduced at once."""

    elements: int
    padding: int


@dataclass(frozen=True)
class RankAccount:
    """What one rank was found to hold."""

    place: Place
    tensors: dict[str, Tensor]
    buckets: list[Bucket]
    shard_elements: int
    """Elements whose master weights and moments this data rank keeps."""
    outputs: list[tuple[int, ...]]
    """Shape that each chunk leaves of the first row: hidden states, or losses of targets."""


def representative_ranks(config: Config, world_size: int) -> list[int]:
    """The first and the last rank of every stage: between them ranks differ in nothing but their number."""
    # Stages are the slowest axis of the grid, so each one's ranks are neighbours.
    per_stage = world_size // config.parallel.pipeline_model_parallel_size
    first = range(0, world_size, per_stage)
    return sorted({*first, *(rank + per_stage - 1 for rank in first)})


def first_row_targets(config: Config) -> tuple[int, str]:
    """Targets of the run's first row, and where the number comes from."""
    # A recipe names data that is not made yet; the shapes need its number of targets only.
    corpus, plan = Path(config.data.train_corpus or ""), Path(config.data.train_plan or "")
    if not plan.is_dir() or not corpus.is_dir():
        return int(TARGET_SHARE * config.data.row_length), f"assumed: {plan} or {corpus} is not here"
    # Its own checks of plan, corpus and model against one another come with it.
    return int(open_loader(corpus, plan, config).plan.targets_R[0]), f"from {plan}"


def account_of(config: Config, rank: int, world_size: int, num_targets: int) -> RankAccount:
    """Build one rank's part of the run and run the first row through its chunks.

    Raises:
        RuntimeError: if two data ranks would update one element, or none would; if a parameter lies outside
            its gradient bucket; if a chunk leaves another shape than the next stage expects.
    """
    # Left between ranks: groups of one place would answer for another.
    with fake_world(config, rank, world_size) as layout:
        engine = build_engine(config, layout)
        tensors = {
            name: Tensor(
                parameter.numel(),
                is_cut=tensor_parallel_dim(parameter) is not None,
                is_copy=chunk.post_process and not chunk.pre_process and "word_embeddings" in name,
            )
            for chunk in engine.chunks
            for name, parameter in named_global_parameters([chunk])
        }
        # Interleaved stages have a buffer for each chunk.
        buffers = [buffer for wrapped in engine.wrapped for buffer in wrapped.buffers]
        return RankAccount(
            place=place_of_rank(config, world_size, rank),
            tensors=tensors,
            buckets=[bucket for buffer in buffers for bucket in _buckets(buffer)],
            shard_elements=sum(_shard_elements(buffer, layout.data_rank) for buffer in buffers),
            outputs=_run_first_row(engine, num_targets),
        )


def _buckets(buffer: Any) -> Iterator[Bucket]:
    """The buffer's buckets; every parameter must lie in its bucket's part without padding.

    Where it does, padding can be left out of a checkpoint and put back (`optimizer.py`).
    """
    for parameter, (start, end, index) in buffer.param_index_map.items():
        bucket = buffer.buckets[index]
        if not bucket.offset <= start < end <= bucket.offset + bucket.numel_unpadded:
            raise RuntimeError(
                f"a parameter of {parameter.numel()} elements lies at {start} to {end}, its gradient bucket "
                f"at {bucket.offset} to {bucket.offset + bucket.numel_unpadded}: a checkpoint would be wrong"
            )
    for bucket in buffer.buckets:
        elements = bucket.grad_data.numel()
        yield Bucket(elements, elements - bucket.numel_unpadded)


def _shard_elements(buffer: Any, data_rank: int) -> int:
    """Elements of this data rank, once the shards of all of them are seen to cover each parameter once."""
    size = buffer.data_parallel_group.size()
    covered: dict[torch.nn.Parameter, int] = dict.fromkeys(buffer.param_index_map, 0)
    own = 0
    for bucket in buffer.buckets:
        shard = bucket.grad_data.numel() // size
        for rank in range(size):
            start = bucket.offset + rank * shard
            # The function that megatron-core's optimizer asks for its own rank, asked for every rank.
            ranges = DistributedOptimizer._build_model_gbuf_param_range_map(
                buffer.param_index_map, Range(start, start + shard), bucket.offset
            )
            for parameter, where in ranges.items():
                # Ranks come in order, so a part that does not begin where the last ended leaves a gap.
                if where["param"].start != covered[parameter]:
                    raise RuntimeError(
                        f"data rank {rank} keeps a parameter from element {where['param'].start} on, ranks "
                        f"before it up to {covered[parameter]}"
                    )
                covered[parameter] = where["param"].end
                own += where["param"].size if rank == data_rank else 0
    rest = [parameter.numel() - end for parameter, end in covered.items() if end != parameter.numel()]
    if rest:
        raise RuntimeError(f"{len(rest)} parameters have elements that no data rank keeps, first {rest[0]}")
    return own


def _run_first_row(engine: Engine, num_targets: int) -> list[tuple[int, ...]]:
    """Shapes that every chunk leaves of a row, checked against what the next one takes."""
    config, layout = engine.config, engine.layout
    length = config.data.row_length
    local = length // (layout.tensor_size if config.parallel.sequence_parallel else 1)
    hidden_shape = (local, 1, config.model.hidden_size)
    slots_T, targets_M = (torch.empty(size, dtype=torch.int64, device=META) for size in (length, num_targets))
    # One row is enough: all have the same shape, whatever lies in them.
    context = RowContext(row=0, bounds=None)  # type: ignore[arg-type]  # shapes see no bounds
    batch = MicroBatch(context, slots_T, slots_T, targets_M, targets_M)
    if config.parallel.overlap_param_gather:
        # A gather that waits for its module would be started here, and there is nobody to gather from.
        for wrapped in engine.wrapped:
            wrapped.disable_forward_pre_hook(param_sync=False)
    outputs: list[tuple[int, ...]] = []
    for chunk in engine.chunks:
        if not chunk.pre_process:
            chunk.set_input_tensor(torch.empty(hidden_shape, dtype=chunk.config.params_dtype, device=META))
        output = chunk(batch)
        is_loss = isinstance(output, TargetLosses)
        shape = tuple((output.losses_M if is_loss else output).shape)
        expected = (num_targets,) if chunk.post_process else hidden_shape
        if shape != expected:
            raise RuntimeError(f"a chunk leaves {shape} of a row, {expected} is expected of it")
        outputs.append(shape)
    return outputs


def check_accounts(config: Config, world_size: int, accounts: Sequence[RankAccount]) -> list[str]:
    """What the accounts of the first and last rank of every stage, or of more, add up to; in words.

    Raises:
        RuntimeError: unless every tensor is owned by one stage, ranks of a stage hold equal parts, and all
            owned parts together are the model.
    """
    owners: dict[str, int] = {}
    sizes: dict[str, Tensor] = {}
    for account in accounts:
        stage = account.place.stage
        held = sum(tensor.elements for tensor in account.tensors.values())
        if held != stage_parameters(config, stage):
            expected = stage_parameters(config, stage)
            raise RuntimeError(f"{account.place} holds {held:,} parameters, not {expected:,}")
        for name, tensor in account.tensors.items():
            # The last stage updates it too, from the same gradient, but the first one owns it.
            if tensor.is_copy:
                continue
            if owners.setdefault(name, stage) != stage or sizes.setdefault(name, tensor) != tensor:
                raise RuntimeError(f"{name}: owned by stage {owners[name]}, and by stage {stage} as {tensor}")
    tensor_size = config.parallel.tensor_model_parallel_size
    # A cut tensor counts once a tensor rank, a replicated one once.
    total = sum(tensor.elements * (tensor_size if tensor.is_cut else 1) for tensor in sizes.values())
    expected = parameter_count(config.model)
    if total != expected:
        raise RuntimeError(f"the ranks add up to {total:,} parameters, the model has {expected:,}")
    return _summary(config, world_size, accounts, total, len(sizes))


def _summary(
    config: Config, world_size: int, accounts: Sequence[RankAccount], total: int, num_tensors: int
) -> list[str]:
    buckets = [bucket for account in accounts for bucket in account.buckets]
    padded = sum(bucket.padding > 0 for bucket in buckets)
    shards = [account.shard_elements for account in accounts]
    data_size = data_parallel_size(config, world_size)
    shapes = sorted({shape for account in accounts for shape in account.outputs}, reverse=True)
    return [
        f"dry run: {len(accounts)} of {world_size:,} ranks built",
        f"parameters: {total:,} in {num_tensors:,} tensors, each owned by one stage; every element is kept "
        f"by one of {data_size} data ranks, {min(shards):,} to {max(shards):,} a rank",
        f"gradient buckets: {len(buckets)}, {padded} padded; every parameter lies where it is cut out",
        f"batch: {rows_per_step(config)} rows = {data_size} data ranks x "
        f"{micro_batches_per_step(config, world_size)} micro-batches; a row leaves "
        + " and ".join(str(list(shape)) for shape in shapes),
    ]
