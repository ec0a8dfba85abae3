"""The values that each numeric field may take, whatever the other fields say: one row per field.

    model.hidden_dropout   0 <= value < 1
    training.steps         1 or more

A test walks the schema, so that a new numeric field without a row is found.
"""

from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """The values one field may take, whatever the others say."""

    key: str
    allowed: str
    holds: Callable[[float], bool]


def _at_least(minimum: float, *keys: str) -> tuple[Range, ...]:
    return tuple(Range(key, f"{minimum} or more", lambda value: value >= minimum) for key in keys)


def _positive(*keys: str) -> tuple[Range, ...]:
    return tuple(Range(key, "more than 0", lambda value: value > 0) for key in keys)


# 1 is out: a dropout of 1 divides what it keeps by 0, a beta of 1 never takes in a gradient.
def _fraction(*keys: str) -> tuple[Range, ...]:
    return tuple(Range(key, "0 <= value < 1", lambda value: 0 <= value < 1) for key in keys)


RANGES: tuple[Range, ...] = (
    *_at_least(
        1, "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.ffn_hidden_size"
    ),
    *_at_least(1, "model.max_position_embeddings", "model.vocab_size", "data.row_length"),
    *_fraction("model.hidden_dropout", "model.attention_dropout", "model.embedding_dropout"),
    *_at_least(1, "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    # One chunk per stage is no interleaving: megatron-core takes None for it.
    *_at_least(2, "parallel.virtual_pipeline_model_parallel_size"),
    *_at_least(1, "parallel.recompute_num_layers"),
    # A standard deviation of 0 would make all units of a layer equal for good.
    *_positive("model.init_method_std", "parallel.distributed_timeout_minutes"),
    # adam_eps divides where a parameter has had no gradient, as an unused word's row.
    *_positive("optimizer.learning_rate", "optimizer.adam_eps"),
    # 0 turns each of them off, and the learning rate may end at 0.
    *_at_least(0, "optimizer.min_learning_rate", "optimizer.warmup_steps"),
    *_at_least(0, "optimizer.weight_decay", "optimizer.clip_grad"),
    *_fraction("optimizer.adam_beta1", "optimizer.adam_beta2"),
    *_positive("optimizer.initial_loss_scale", "optimizer.min_loss_scale"),
    *_at_least(1, "optimizer.loss_scale_window", "optimizer.loss_scale_hysteresis"),
    *_at_least(1, "training.steps", "training.global_batch_positions", "training.log_interval"),
    # 0 means "only after the last step" for intervals.
    *_at_least(0, "training.seed", "training.validation_interval"),
    *_at_least(0, "checkpoint.save_interval", "checkpoint.keep_every", "checkpoint.keep_best"),
    # Not 0: the newest is what a killed run resumes from.
    *_at_least(1, "checkpoint.keep_last"),
    *_at_least(0, "evaluation.examples_per_task"),
    *_at_least(1, "evaluation.max_new_tokens", "evaluation.generation_batch_size"),
)
