"""What one rank of each pipeline stage holds, in parameters and bytes, from the configuration alone.

OPT-175B in bf16 on tensor 8 x pipeline 16 x data 8, sequence parallel, rows of 2,048, 16 micro-batches:

    stage_parameters(config, 0)        1,461,869,568
    stage_memory(config, 1024, 0)      weights 2.7 GiB, gradients 5.4, optimizer 2.0, activations 6.8

Weights and optimizer state are exact but for the padding of buckets; activations count what our layers keep
for the backward (`activation_bytes`), not what an allocator loses. Measured against it: OPT-1.3B on one H100,
rows of 16,384: 40.4 GiB by this page, 40.7 GiB in benchmarks/results/train_step.jsonl.
"""

from typing import NamedTuple

from megatron_iml.config.layout import chunk_layers, data_parallel_size, micro_batches_per_step
from megatron_iml.config.schema import Config
from megatron_iml.config.sizes import POSITION_OFFSET

# The default of kernels/target_loss/op.py, written down here since config may import no kernel.
LOGIT_CHUNK = 2048
"""Targets whose logits exist at once in the LM head."""


class StageMemory(NamedTuple):
    """Bytes on one rank of a stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float


def stage_layers(config: Config, stage: int) -> list[range]:
    """Global layer numbers of each chunk of a stage: one range, or one per interleaved part."""
    # Every stages-th chunk: neighbours in depth lie on neighbouring stages.
    layers, stages = chunk_layers(config), config.parallel.pipeline_model_parallel_size
    return [
        range(sum(layers[:chunk]), sum(layers[: chunk + 1])) for chunk in range(stage, len(layers), stages)
    ]


def stage_parameters(config: Config, stage: int) -> int:
    """Parameters that one rank of a stage holds; the last stage's copy of the embedding included."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    h, f = model.hidden_size, model.ffn_hidden_size
    # Cut over tensor ranks: the four projections and the biases of the two that are cut by columns.
    cut = 4 * h * h + 2 * h * f + 3 * h + f
    # Whole on each: two norms and the biases added after a sum over ranks.
    layer = cut // tp + 6 * h
    last = config.parallel.pipeline_model_parallel_size - 1
    parameters = layer * sum(map(len, stage_layers(config, stage)))
    # The position table is whole on every tensor rank, the word embedding cut by rows.
    words = model.vocab_size * h // tp
    if stage == 0:
        parameters += words + (model.max_position_embeddings + POSITION_OFFSET) * h
    if stage == last:
        # The final norm. Alone on its stage, the head is the embedding and holds no second copy.
        parameters += 2 * h + (words if last > 0 else 0)
    return parameters


def stage_memory(config: Config, world_size: int, stage: int) -> StageMemory:
    """Bytes of one rank of a stage while it trains."""
    parameters = stage_parameters(config, stage)
    is_fp32 = config.training.precision == "fp32"
    return StageMemory(
        weights=parameters * (4 if is_fp32 else 2),
        # Summed in fp32, whole on every data rank.
        gradients=4 * parameters,
        # Two moments, and master weights unless the weights are fp32 themselves; cut over data ranks.
        optimizer=(8 if is_fp32 else 12) * parameters / data_parallel_size(config, world_size),
        activations=_activations(config, world_size, stage),
    )


def activation_bytes(config: Config) -> tuple[float, float]:
    """What one layer keeps of one row for the backward: (with all kept, with full recomputation).

    Of [T, h]: the layer's input, both norms' outputs and the sum in the middle, cut by sequence parallelism;
    query, key and value, attention's output and the feed-forward's ReLU (f / h), cut by tensor parallelism.
    Selective recomputation keeps the same but for 4 bytes per slot and head: attention is flash attention.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    # Dropout masks are not among them: the backward draws them again from their keys.
    hidden = config.data.row_length * model.hidden_size * (4 if config.training.precision == "fp32" else 2)
    along_row = hidden / (tp if parallel.sequence_parallel else 1)
    return 4 * along_row + (4 + model.ffn_hidden_size / model.hidden_size) * hidden / tp, along_row


def rows_in_flight(config: Config, world_size: int, stage: int) -> float:
    """Rows whose activations a stage holds at once, in units of all its layers.

    1F1B: stage s of p has p - s of them. Interleaved, a stage starts 2 (p - s - 1) + (v - 1) p chunks before
    its first backward, each a v-th of its layers.
    """
    stages = config.parallel.pipeline_model_parallel_size
    parts = config.parallel.virtual_pipeline_model_parallel_size or 1
    rows = micro_batches_per_step(config, world_size)
    # Fewer rows than the pipeline is deep never fill it.
    if parts == 1:
        return min(rows, stages - stage)
    return min(rows * parts, 2 * (stages - stage - 1) + (parts - 1) * stages + 1) / parts


def _activations(config: Config, world_size: int, stage: int) -> float:
    parallel, model = config.parallel, config.model
    whole, boundary = activation_bytes(config)
    layers = sum(map(len, stage_layers(config, stage)))
    in_flight = rows_in_flight(config, world_size, stage)
    if parallel.recompute_granularity != "full":
        held = in_flight * layers * whole
    elif parallel.recompute_method == "uniform":
        # Every group keeps its input; one group at a time is there whole.
        # Whole in every chunk: rule `recompute_fits_chunk`.
        groups = layers / parallel.recompute_num_layers
        held = in_flight * groups * boundary + parallel.recompute_num_layers * whole
    else:
        recomputed = sum(
            min(len(part), parallel.recompute_num_layers) for part in stage_layers(config, stage)
        )
        held = in_flight * (recomputed * boundary + (layers - recomputed) * whole) + whole
    if stage == parallel.pipeline_model_parallel_size - 1:
        # The head: a chunk of logits, and the hidden states of the row with their gradient.
        element = 4 if config.training.precision == "fp32" else 2
        tp = parallel.tensor_model_parallel_size
        held += LOGIT_CHUNK * model.vocab_size * element / tp
        held += 2 * config.data.row_length * model.hidden_size * element
    return held
