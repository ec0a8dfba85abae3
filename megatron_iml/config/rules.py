"""Whether a resolved `Config` can train on a world of so many ranks, said before anything is started.

    check_config(config, world_size=6)  with tensor 4  ->  ValueError:
    world size: got 6; allowed: a multiple of tensor x pipeline = 4 x 1 = 4; start another number ...

Each rule is a function of (config, world size) that returns a problem in one line, or None; all problems of a
config are raised together, since a cluster's queue is a slow place to learn of them one by one.
"""

from collections.abc import Iterable

from megatron_iml.config.layout import (
    LAYOUT_RULES,
    Rule,
    chunk_layers,
    data_parallel_size,
    micro_batches_per_step,
    problem,
)
from megatron_iml.config.ranges import RANGES, Range
from megatron_iml.config.schema import Config


def check_config(config: Config, world_size: int) -> None:
    """Raise ValueError unless `config` can train on `world_size` ranks."""
    check_layout(config, world_size)
    _raise_if_any(rule(config, world_size) for rule in TRAINING_RULES)


def check_layout(config: Config, world_size: int) -> None:
    """Raise ValueError unless the model of `config` fits on `world_size` ranks: all that evaluation needs."""
    # In two steps, since the layout's divisions mean nothing while a size is 0.
    _raise_if_any(_out_of_range(config, row) for row in RANGES)
    _raise_if_any(rule(config, world_size) for rule in LAYOUT_RULES)


def _raise_if_any(outcomes: Iterable[str | None]) -> None:
    problems = [outcome for outcome in outcomes if outcome is not None]
    if problems:
        raise ValueError("\n".join(problems))


def _out_of_range(config: Config, row: Range) -> str | None:
    # KeyError for a row whose field the schema lost: every test of a rule meets it.
    section, _, name = row.key.partition(".")
    value = vars(vars(config)[section])[name]
    # None is an optional size that is not used.
    if value is None or row.holds(value):
        return None
    return problem(row.key, value, row.allowed, f"change {row.key}")


def recompute_fits_chunk(config: Config, world_size: int) -> str | None:
    """Full recompute groups the layers of one chunk; megatron-core indexes past its end otherwise."""
    # Interleaved ones too: each is a TransformerBlock of megatron-core, which recomputes within itself.
    parallel, chunks = config.parallel, sorted(set(chunk_layers(config)))
    count, method = parallel.recompute_num_layers, parallel.recompute_method
    if parallel.recompute_granularity != "full":
        return None
    # `block` takes the first layers of each chunk, as many as there are.
    if all(layers % count == 0 for layers in chunks) if method == "uniform" else count <= chunks[-1]:
        return None
    sizes = " and ".join(map(str, chunks))
    allowed = f"a divisor of {sizes}" if method == "uniform" else f"at most {chunks[-1]}"
    return problem(
        "parallel.recompute_num_layers",
        f"{count} with recompute_method {method}",
        f"{allowed}, the layers of one pipeline chunk",
        "change parallel.recompute_num_layers",
    )


def overlapped_gather_has_what_it_needs(config: Config, world_size: int) -> str | None:
    """Weights are gathered bucket by bucket, in the buckets that overlapped reduction cuts."""
    # megatron-core takes the pair without a word: one bucket holds all weights then, and nothing overlaps.
    if not config.parallel.overlap_param_gather or config.parallel.overlap_grad_reduce:
        return None
    return problem(
        "parallel.overlap_param_gather",
        "true with overlap_grad_reduce false",
        "true only if overlap_grad_reduce is true",
        "set parallel.overlap_grad_reduce=true or parallel.overlap_param_gather=false",
    )


def flash_attention_is_asked_what_it_computes(config: Config, world_size: int) -> str | None:
    """flash-attn has kernels for 16-bit types, and dropout masks that no seed and coordinates give again."""
    dropout, precision = config.model.attention_dropout, config.training.precision
    if config.model.attention_backend != "flash" or (dropout == 0.0 and precision != "fp32"):
        return None
    return problem(
        "model.attention_backend",
        f"flash with model.attention_dropout {dropout} and training.precision {precision}",
        "flash only with attention dropout 0 in bf16 or fp16",
        "set model.attention_dropout=0, or use another attention backend",
    )


def batch_is_whole_rows(config: Config, world_size: int) -> str | None:
    """A step is the same number of rows on every data-parallel rank."""
    positions, row = config.training.global_batch_positions, config.data.row_length
    dp = data_parallel_size(config, world_size)
    if positions % (row * dp) == 0:
        return None
    # The nearest batches that fit; there is none below a first row on every rank.
    below = positions // (row * dp) * row * dp
    remedy = f"set it to {below + row * dp}" + (f" or {below}" if below else "")
    allowed = f"a multiple of data.row_length x data parallel = {row} x {dp} = {row * dp}"
    return problem("training.global_batch_positions", positions, allowed, remedy)


def interleaving_divides_micro_batches(config: Config, world_size: int) -> str | None:
    """The interleaved schedule hands micro-batches on in groups of one per stage."""
    if config.parallel.virtual_pipeline_model_parallel_size is None:
        return None
    pp, count = config.parallel.pipeline_model_parallel_size, micro_batches_per_step(config, world_size)
    if count % pp == 0:
        return None
    # In the unit of the field that the user sets: positions, not micro-batches.
    unit = config.data.row_length * data_parallel_size(config, world_size) * pp
    return problem(
        "micro-batches per step of an interleaved pipeline",
        count,
        f"a multiple of parallel.pipeline_model_parallel_size {pp}",
        f"make training.global_batch_positions a multiple of {unit}",
    )


def weights_have_one_start(config: Config, world_size: int) -> str | None:
    """A run names its initial weights or says outright that it starts from random ones."""
    weights, initialisation = config.checkpoint.initial_weights, config.model.initialisation
    # Both would be one too many: which of them won would be a matter of the order of two calls.
    if (weights is None) != (initialisation is None):
        return None
    return problem(
        "start of the weights",
        f"checkpoint.initial_weights {weights or 'null'} and model.initialisation {initialisation or 'null'}",
        "exactly one of the two",
        "name a checkpoint in checkpoint.initial_weights, or set model.initialisation=random",
    )


def training_data_is_named(config: Config, world_size: int) -> str | None:
    """Training reads a corpus through a plan."""
    missing = [name for name in ("train_corpus", "train_plan") if vars(config.data)[name] is None]
    if not missing:
        return None
    keys = " and ".join(f"data.{name}" for name in missing)
    return problem(keys, "null", "a folder", "name what tools/preprocess wrote for the train split")


def validation_data_is_complete(config: Config, world_size: int) -> str | None:
    """A validation loss needs a corpus, plans over it, and neither alone."""
    corpus, plans = config.data.validation_corpus, config.data.validation_plans
    # Interval 0 still measures after the last step, if there is something to measure on.
    wanted = config.training.validation_interval > 0
    # Three faults: a corpus without plans, plans without a corpus, an interval with neither.
    if (corpus is None) == (not plans) and not (wanted and not plans):
        return None
    return problem(
        "validation",
        f"data.validation_corpus {corpus or 'null'}, {len(plans)} data.validation_plans, "
        f"training.validation_interval {config.training.validation_interval}",
        "a corpus with one plan or more, or neither of them and interval 0",
        "name the missing one, or leave both out and set training.validation_interval=0",
    )


def warmup_fits_run(config: Config, world_size: int) -> str | None:
    """The warm-up ends before the run does."""
    # As many is allowed: `training/schedule.py` has nothing left to decay then.
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup <= steps:
        return None
    return problem(
        "optimizer.warmup_steps", warmup, f"at most training.steps {steps}", "lower optimizer.warmup_steps"
    )


def learning_rate_decays(config: Config, world_size: int) -> str | None:
    """The schedule goes down from the peak."""
    peak, final = config.optimizer.learning_rate, config.optimizer.min_learning_rate
    if final <= peak:
        return None
    allowed = f"at most optimizer.learning_rate {peak}"
    return problem("optimizer.min_learning_rate", final, allowed, "lower optimizer.min_learning_rate")


def loss_scale_has_room(config: Config, world_size: int) -> str | None:
    """The fp16 loss scale starts at or above its floor."""
    first, floor = config.optimizer.initial_loss_scale, config.optimizer.min_loss_scale
    # bf16 and fp32 scale no loss, and their configs keep the defaults of both fields.
    if config.training.precision != "fp16" or floor <= first:
        return None
    allowed = f"at least optimizer.min_loss_scale {floor}"
    return problem("optimizer.initial_loss_scale", first, allowed, "raise optimizer.initial_loss_scale")


def kept_steps_are_saved(config: Config, world_size: int) -> str | None:
    """Steps to keep for good are steps that are saved."""
    every, interval = config.checkpoint.keep_every, config.checkpoint.save_interval
    # Interval 0 saves the last step only: a multiple of keep_every would be kept by luck.
    if every == 0 or (interval and every % interval == 0):
        return None
    allowed = f"a multiple of checkpoint.save_interval {interval}" if interval else "0 without save_interval"
    return problem("checkpoint.keep_every", every, allowed, "change checkpoint.keep_every")


def best_checkpoint_has_a_loss(config: Config, world_size: int) -> str | None:
    """The best checkpoints are known by validation losses of their own steps."""
    checkpoint, interval = config.checkpoint, config.training.validation_interval
    plans = config.data.validation_plans
    # save_interval 0 passes: the last step is always validated, and it is the only one saved.
    measured = interval > 0 and checkpoint.save_interval % interval == 0
    if checkpoint.keep_best == 0 or (measured and plans):
        return None
    return problem(
        "checkpoint.keep_best",
        f"{checkpoint.keep_best} with checkpoint.save_interval {checkpoint.save_interval}, "
        f"training.validation_interval {interval} and {len(plans)} data.validation_plans",
        "more than 0 only if every step that is saved is validated",
        "name validation plans and make save_interval a multiple of validation_interval",
    )


def best_level_is_measured(config: Config, world_size: int) -> str | None:
    """The level that decides has a plan."""
    level, plans = config.checkpoint.best_level, config.data.validation_plans
    if level is None or level in plans:
        return None
    allowed = f"null or one of data.validation_plans: {', '.join(plans) or 'there are none'}"
    return problem("checkpoint.best_level", level, allowed, "change checkpoint.best_level")


# A list by hand and not by a decorator: what is checked, and in which order it is said, is seen here.
TRAINING_RULES: tuple[Rule, ...] = (
    recompute_fits_chunk,
    overlapped_gather_has_what_it_needs,
    flash_attention_is_asked_what_it_computes,
    batch_is_whole_rows,
    interleaving_divides_micro_batches,
    weights_have_one_start,
    training_data_is_named,
    validation_data_is_complete,
    warmup_fits_run,
    learning_rate_decays,
    loss_scale_has_room,
    kept_steps_are_saved,
    best_checkpoint_has_a_loss,
    best_level_is_measured,
)
