"""A layout in words, before anything is allocated: which rank holds what, what waits, what is sent when.

    print(explain(config, world_size=1024))        # python -m megatron_iml.train --config ... --explain

Only arithmetic on the configuration: it imports no torch and answers in a moment, for a world of any size.
"""

from collections.abc import Iterator

from megatron_iml.config.layout import (
    data_parallel_size,
    micro_batches_per_step,
    num_chunks,
    rows_per_step,
)
from megatron_iml.config.memory import stage_layers, stage_memory, stage_parameters
from megatron_iml.config.schema import Config
from megatron_iml.config.sizes import parameter_count

GIB = 2**30


def explain(config: Config, world_size: int) -> str:
    """The layout of a checked configuration, as lines of text."""
    return "\n".join(
        [
            *_world(config, world_size),
            "",
            *_stages(config, world_size),
            "",
            *_step(config, world_size),
            "",
            *_sent(config, world_size),
        ]
    )


def bubble(config: Config, world_size: int) -> float:
    """Share of a step in which a stage waits for the pipeline to fill and drain.

    (p - 1) / v micro-batches' time, against m micro-batches of work: Narayanan et al. 2021, section 2.2.
    """
    parallel = config.parallel
    idle = (parallel.pipeline_model_parallel_size - 1) / (parallel.virtual_pipeline_model_parallel_size or 1)
    return idle / (micro_batches_per_step(config, world_size) + idle)


def _world(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = data_parallel_size(config, world_size)
    yield (
        f"OPT: {model.num_layers} layers x {model.hidden_size:,}, {parameter_count(model):,} parameters, "
        f"{config.training.precision}"
    )
    yield f"world: {world_size:,} ranks = tensor {tp} x data {dp} x pipeline {pp}"
    yield f"rank = tensor + {tp} x (data + {dp} x stage): tensor ranks are neighbours, so one node holds them"


def _stages(config: Config, world_size: int) -> Iterator[str]:
    """A table of the stages; those between first and last that are alike share a line."""
    stages = config.parallel.pipeline_model_parallel_size
    # Stages vary slowest in a rank's number, so each holds one block of ranks.
    per_stage = world_size // stages
    groups: list[list[int]] = []
    for stage in range(stages):
        # The first and the last never share a line: they hold the embedding and the head.
        alike = groups and groups[-1][0] > 0 and stage < stages - 1
        if alike and _lengths(config, stage) == _lengths(config, groups[-1][0]):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    yield "memory of one rank in GiB (activations: estimate)"
    yield (
        f"{'stage':>7} {'ranks':>11} {'layers':>15}  {'holds':<14} {'parameters':>14} {'weights':>8} "
        f"{'gradients':>9} {'optimizer':>9} {'activations':>11} {'sum':>7}"
    )
    for group in groups:
        first, last = group[0], group[-1]
        # Alike but for activations: the earlier a stage, the more rows it holds at once.
        memory = stage_memory(config, world_size, first)
        ranks = f"{first * per_stage}-{(last + 1) * per_stage - 1}"
        sizes = [size / GIB for size in memory]
        yield (
            f"{_span(first, last):>7} {ranks if per_stage * len(group) > 1 else first:>11} "
            f"{_layers(config, group):>15}  {_holds(config, first):<14} "
            f"{stage_parameters(config, first):>14,} {sizes[0]:>8.1f} {sizes[1]:>9.1f} {sizes[2]:>9.1f} "
            f"{sizes[3]:>11.1f} {sum(sizes):>7.1f}"
        )


def _lengths(config: Config, stage: int) -> list[int]:
    return [len(part) for part in stage_layers(config, stage)]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _layers(config: Config, group: list[int]) -> str:
    if len(group) > 1:
        return " + ".join(map(str, _lengths(config, group[0]))) + " each"
    return ", ".join(_span(part[0], part[-1]) for part in stage_layers(config, group[0]))


def _holds(config: Config, stage: int) -> str:
    last = config.parallel.pipeline_model_parallel_size - 1
    return " ".join([*(["embedding"] if stage == 0 else []), *(["head"] if stage == last else [])])


def _step(config: Config, world_size: int) -> Iterator[str]:
    rows, micro_batches = rows_per_step(config), micro_batches_per_step(config, world_size)
    parallel = config.parallel
    yield (
        f"step: {rows} rows of {config.data.row_length:,} positions, one row a micro-batch, "
        f"{micro_batches} micro-batches a rank"
    )
    if parallel.pipeline_model_parallel_size > 1:
        parts = parallel.virtual_pipeline_model_parallel_size or 1
        yield (
            f"pipeline bubble: {bubble(config, world_size):.1%} of the step "
            f"({parallel.pipeline_model_parallel_size - 1} of {micro_batches} micro-batches' time"
            + (f", divided by {parts} interleaved parts)" if parts > 1 else ")")
        )
    recompute = {
        "none": "nothing",
        "selective": "attention",
        "full": f"layers, {parallel.recompute_method} by {parallel.recompute_num_layers}",
    }
    yield f"recomputed in the backward: {recompute[parallel.recompute_granularity]}"


def _sent(config: Config, world_size: int) -> Iterator[str]:
    """What travels between ranks, by how often."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = data_parallel_size(config, world_size)
    # bf16 and fp16 alike; gradients below are fp32 whatever the precision.
    element = 4 if config.training.precision == "fp32" else 2
    hidden = config.data.row_length * model.hidden_size * element
    yield "sent, by one rank:"
    if tp > 1:
        how = "reduce-scatter and all-gather" if parallel.sequence_parallel else "all-reduce"
        yield (
            f"  every layer and row: 4 sums over tensor ranks ({how}) of {_size(hidden)}, 2 forward and 2 "
            "backward"
        )
    if pp > 1:
        # Under sequence parallelism each tensor rank sends its part of the row, else each sends all of it.
        message = hidden / (tp if parallel.sequence_parallel else 1)
        yield (
            f"  every row: hidden states of {_size(message)} to the next stage and as much gradient back, "
            f"over {num_chunks(config) - 1} border{'s' * (num_chunks(config) > 2)} between chunks"
        )
    # The first or the last one: a step waits for whoever has most to send.
    largest = max(stage_parameters(config, stage) for stage in range(pp))
    if dp > 1:
        when = "while the backward runs" if parallel.overlap_grad_reduce else "after the backward"
        yield f"  every step: gradients, up to {_size(4 * largest)} reduce-scattered over data ranks {when}"
        when = "while the next forward runs" if parallel.overlap_param_gather else "after the update"
        yield f"  every step: weights, up to {_size(element * largest)} all-gathered over data ranks {when}"
    if pp > 1:
        # 4 bytes: the two copies' gradients are summed in their fp32 buffers.
        words = 4 * model.vocab_size * model.hidden_size / tp
        yield f"  every step: {_size(words)} of embedding gradient between the first and the last stage"
    if world_size > 1:
        yield "  every step: 8 numbers of every rank to every rank (loss, targets, digests, speed, memory)"
    else:
        yield "  nothing: one rank"


def _size(number_of_bytes: float) -> str:
    if number_of_bytes >= GIB / 10:
        return f"{number_of_bytes / GIB:.2f} GiB"
    return f"{number_of_bytes / 2**20:.3g} MiB"
