"""How a model is spread over ranks: the sizes that follow from a `Config`, and the rules they must obey.

Worked example, 64 ranks with tensor 4 and pipeline 2, 524,288 positions a step in rows of 2,048:

    data_parallel_size     = 64 / (4 x 2)     = 8
    rows_per_step          = 524,288 / 2,048  = 256
    micro_batches_per_step = 256 / 8          = 32    rows that each data-parallel rank runs per step

Each rule is a function of (config, world size) that returns a problem in one line, or None.
"""

from collections.abc import Callable

from megatron_iml.config.schema import Config

Rule = Callable[[Config, int], str | None]


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks that hold the same shard of the model: world / (tensor x pipeline)."""
    parallel = config.parallel
    return world_size // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)


def rows_per_step(config: Config) -> int:
    """Packed rows of one optimizer step over all ranks."""
    return config.training.global_batch_positions // config.data.row_length


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Rows that one data-parallel rank runs, one after another, in one optimizer step."""
    return rows_per_step(config) // data_parallel_size(config, world_size)


def layers_per_chunk(config: Config) -> int:
    """Layers of one model chunk: of a pipeline stage, or of one of its interleaved parts."""
    parallel = config.parallel
    chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    return config.model.num_layers // chunks


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
        "start another number of ranks, or change parallel.tensor_model_parallel_size or "
        "parallel.pipeline_model_parallel_size",
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


def chunks_divide_layers(config: Config, world_size: int) -> str | None:
    """Every stage, and every interleaved chunk of it, has the same number of layers."""
    pp, vp = (
        config.parallel.pipeline_model_parallel_size,
        config.parallel.virtual_pipeline_model_parallel_size,
    )
    chunks = pp * (vp or 1)
    if config.model.num_layers % chunks == 0:
        return None
    return problem(
        "model.num_layers",
        config.model.num_layers,
        f"a multiple of pipeline x virtual pipeline = {pp} x {vp or 1} = {chunks}",
        "change parallel.pipeline_model_parallel_size or parallel.virtual_pipeline_model_parallel_size",
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
    chunks_divide_layers,
    interleaving_has_a_pipeline,
    sequence_parallel_has_tensor_parallel,
    sequence_parallel_divides_row,
)
