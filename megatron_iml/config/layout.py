"""How a model is spread over ranks: the sizes that follow from a `Config`, and the rules they must obey.

Worked example, 64 ranks with tensor 4 and pipeline 2, 524,288 positions a step in rows of 2,048:

    data_parallel_size     = 64 / (4 x 2)     = 8
    rows_per_step          = 524,288 / 2,048  = 256
    micro_batches_per_step = 256 / 8          = 32    rows that each data-parallel rank runs per step

Each rule is a function of (config, world size) that returns a problem in one line, or None.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_iml.config.schema import Config

TARGET_SHARE = 0.086
"""Targets per position of the paper's mix: what the LM head costs follows from it. Where it is far from this
(all-target replay), parallel.pipeline_layers says better."""
EMBEDDING_LAYERS = 0.01
"""Work of the embedding in layers. It computes next to nothing; more than nothing breaks ties."""

# Of (config, world size), and the world counts even where a rule ignores it: all are called alike.
Rule = Callable[[Config, int], str | None]


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same shard of the model: world / (tensor x pipeline)."""
    parallel = config.parallel
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


class Place(NamedTuple):
    """A rank's coordinates in the tensor x data x pipeline grid."""

    tensor: int
    data: int
    stage: int


def place_of_rank(config: Config, world_size: int, rank: int) -> Place:
    """Where megatron-core puts a rank: tensor ranks are neighbours, then replicas, then stages.

    World 8, TP2, PP2: rank 5 is tensor rank 1 and data rank 0 of stage 1.
    """
    # megatron-core's default order tp-cp-ep-dp-pp, with context and expert parallelism of 1.
    rest, tensor = divmod(rank, config.parallel.tensor_model_parallel_size)
    stage, data = divmod(rest, data_parallel_size(config, world_size))
    return Place(tensor, data, stage)


def rows_per_step(config: Config) -> int:
    """Packed rows of one optimizer step over all ranks."""
    # Exact in a checked config; before that a remainder is for rule `batch_is_whole_rows` to name.
    return config.training.global_batch_positions // config.data.row_length


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Rows that one data-parallel rank runs, one after another, in one optimizer step."""
    return rows_per_step(config) // data_parallel_size(config, world_size)


def num_chunks(config: Config) -> int:
    """Parts the layers are cut into: pipeline stages times the interleaved parts of each."""
    parallel = config.parallel
    return parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)


def chunk_layers(config: Config) -> tuple[int, ...]:
    """Layers of every model chunk in order of depth; chunk c is part c // stages of stage c % stages.

    As given, or balanced: each layer in turn goes to the chunk with the least work, which for jobs of one
    size keeps the heaviest chunk as light as can be.

        22 layers, 4 stages   ->   (5, 6, 6, 5)       24 layers, 4 stages   ->   (6, 6, 6, 6)
    """
    # Taken on trust, since --explain and the rules call this too; `pipeline_layers_fit` checks it.
    if config.parallel.pipeline_layers is not None:
        return config.parallel.pipeline_layers
    model, chunks = config.model, num_chunks(config)
    # A chunk without layers would be legal, and a mistake.
    layers, work = [1] * chunks, [1.0] * chunks
    work[0] += EMBEDDING_LAYERS
    # Against the matrices of one layer: 4 h^2 of attention and 2 h f of feed-forward.
    layer_weights = 4 * model.hidden_size + 2 * model.ffn_hidden_size
    work[-1] += TARGET_SHARE * model.vocab_size / layer_weights
    for _ in range(model.num_layers - chunks):
        # The first of equals, so that the split is the same on every rank.
        lightest = work.index(min(work))
        layers[lightest] += 1
        work[lightest] += 1.0
    return tuple(layers)


def problem(what: str, got: object, allowed: str, remedy: str) -> str:
    """The one form of every message: what is wrong, what was got, what is allowed, the remedy."""
    return f"{what}: got {got}; allowed: {allowed}; {remedy}"


def multiple(number_key: str, number: int, divisor_key: str, divisor: int) -> str | None:
    """A problem unless `divisor` divides `number`."""
    if number % divisor == 0:
        return None
    # Either may be the mistake: a model's shape is often fixed, a cluster's size is sometimes.
    allowed = f"a multiple of {divisor_key} {divisor}"
    return problem(number_key, number, allowed, f"change {number_key} or {divisor_key}")


def world_is_divisible(config: Config, world_size: int) -> str | None:
    """Every replica of the model takes tensor x pipeline ranks."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    if world_size % (tp * pp) == 0:
        return None
    return problem(
        "world size",
        world_size,
        f"a multiple of tensor x pipeline = {tp} x {pp} = {tp * pp}",
        "start another number of ranks (with --explain or --dry-run give --world-size), or change "
        "parallel.tensor_model_parallel_size or parallel.pipeline_model_parallel_size",
    )


def heads_divide_hidden(config: Config, world_size: int) -> str | None:
    """Every head has the same whole size."""
    model = config.model
    return multiple(
        "model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads
    )


def tensor_parallel_divides_model(config: Config, world_size: int) -> str | None:
    """Every sharded dimension is cut into equal parts; heads come first, since they limit it most."""
    tp, model = config.parallel.tensor_model_parallel_size, config.model
    dimensions = ("num_attention_heads", "hidden_size", "ffn_hidden_size", "vocab_size")
    outcomes = (
        multiple(f"model.{name}", vars(model)[name], "parallel.tensor_model_parallel_size", tp)
        for name in dimensions
    )
    return next((problem for problem in outcomes if problem), None)


def pipeline_layers_fit(config: Config, world_size: int) -> str | None:
    """Every chunk has a layer or more, and together they have all."""
    given, chunks, layers = config.parallel.pipeline_layers, num_chunks(config), config.model.num_layers
    # Fewer layers than chunks: `chunk_layers` would hand out more than there are.
    if given is None and layers >= chunks:
        return None
    if given is None:
        return problem(
            "model.num_layers",
            layers,
            f"at least pipeline x virtual pipeline = {chunks}, a layer for every chunk",
            "change parallel.pipeline_model_parallel_size or parallel.virtual_pipeline_model_parallel_size",
        )
    if len(given) == chunks and sum(given) == layers and min(given) >= 1:
        return None
    return problem(
        "parallel.pipeline_layers",
        f"{list(given)}, {sum(given)} layers in {len(given)} chunks",
        f"{layers} layers in pipeline x virtual pipeline = {chunks} chunks of 1 or more",
        "change parallel.pipeline_layers, or leave it out to split by cost",
    )


def interleaving_has_a_pipeline(config: Config, world_size: int) -> str | None:
    """Interleaving cuts the stages of a pipeline; without one there is nothing to cut."""
    pp, vp = (
        config.parallel.pipeline_model_parallel_size,
        config.parallel.virtual_pipeline_model_parallel_size,
    )
    if vp is None or pp > 1:
        return None
    return problem(
        "parallel.virtual_pipeline_model_parallel_size",
        f"{vp} with parallel.pipeline_model_parallel_size {pp}",
        "a pipeline of 2 stages or more",
        "raise parallel.pipeline_model_parallel_size, or leave the virtual size out",
    )


def sequence_parallel_has_tensor_parallel(config: Config, world_size: int) -> str | None:
    """Sequence parallelism shards over the tensor-parallel ranks."""
    # megatron-core refuses it too, but as a traceback of every rank and once the groups are built.
    if not config.parallel.sequence_parallel or config.parallel.tensor_model_parallel_size > 1:
        return None
    return problem(
        "parallel.sequence_parallel",
        "true with parallel.tensor_model_parallel_size 1",
        "true only with a tensor parallel size of 2 or more",
        "set parallel.sequence_parallel=false, or raise parallel.tensor_model_parallel_size",
    )


def sequence_parallel_divides_row(config: Config, world_size: int) -> str | None:
    """Every tensor-parallel rank holds an equal part of the row."""
    if not config.parallel.sequence_parallel:
        return None
    tp = config.parallel.tensor_model_parallel_size
    return multiple("data.row_length", config.data.row_length, "parallel.tensor_model_parallel_size", tp)


LAYOUT_RULES: tuple[Rule, ...] = (
    world_is_divisible,
    heads_divide_hidden,
    tensor_parallel_divides_model,
    pipeline_layers_fit,
    interleaving_has_a_pipeline,
    sequence_parallel_has_tensor_parallel,
    sequence_parallel_divides_row,
)
