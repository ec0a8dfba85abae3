"""Every rule: what it lets through, and a first line that says what, got, allowed and remedy."""

from dataclasses import fields

import pytest

from megatron_iml.config import (
    Config,
    check_config,
    check_layout,
    chunk_layers,
    data_parallel_size,
    load_config,
    micro_batches_per_step,
    rows_per_step,
)
from megatron_iml.config.convert import known_keys
from megatron_iml.config.layout import LAYOUT_RULES
from megatron_iml.config.ranges import RANGES
from megatron_iml.config.rules import TRAINING_RULES

# 8 layers, 8 heads of 4: small, with room for tensor, pipeline and virtual pipeline sizes.
VALID = (
    "model.num_layers=8",
    "model.hidden_size=32",
    "model.num_attention_heads=8",
    "model.vocab_size=96",
    "model.initialisation=random",
    "data.train_corpus=corpus/train",
    "data.train_plan=plan/train",
    "data.row_length=64",
    "training.global_batch_positions=1024",
    "training.steps=10",
    "optimizer.warmup_steps=2",
)


def configure(*overrides: str) -> Config:
    return load_config(None, [*VALID, *overrides])


def refusal(world_size: int, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        check_config(configure(*overrides), world_size)
    return str(caught.value)


TP = "parallel.tensor_model_parallel_size="
PP = "parallel.pipeline_model_parallel_size="
VP = "parallel.virtual_pipeline_model_parallel_size="
GROUPS_OF_3 = ("parallel.recompute_num_layers=3",)
ROWS_OF_3 = "training.global_batch_positions=768"
VALIDATED = (
    "data.validation_corpus=c",
    "data.validation_plans={fully_held_out: p}",
    "training.validation_interval=2",
)
RECOMPUTE = ("parallel.recompute_granularity=full", "parallel.recompute_method=")


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (16, ()),
        (8, (TP + "2", PP + "2", "parallel.sequence_parallel=true")),
        (4, (PP + "2", VP + "2")),
        (3, (PP + "3", "training.global_batch_positions=768")),
        (4, (PP + "2", VP + "2", "parallel.pipeline_layers=[1, 2, 3, 2]")),
        (2, (PP + "2", *RECOMPUTE[:1], RECOMPUTE[1] + "uniform", "parallel.recompute_num_layers=2")),
        (2, (PP + "2", *RECOMPUTE[:1], RECOMPUTE[1] + "block", "parallel.recompute_num_layers=3")),
        # Chunks of 2, 3 and 3 layers: `block` takes what a chunk has.
        (3, (PP + "3", *RECOMPUTE[:1], RECOMPUTE[1] + "block", *GROUPS_OF_3, ROWS_OF_3)),
        (2, ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")),
        (1, ("model.initialisation=null", "checkpoint.initial_weights=weights")),
        (1, ("data.validation_corpus=c", "data.validation_plans={fully_held_out: p}")),
        (1, ("model.attention_backend=flash", "model.attention_dropout=0")),
        (1, ("model.max_position_embeddings=32",)),  # rows may be longer than a document,
        (1, ("model.max_position_embeddings=128",)),  # or shorter
        (1, ("optimizer.warmup_steps=10", "optimizer.warmup_steps=0")),
        (1, ("optimizer.min_loss_scale=256",)),  # of no interest outside fp16
        (1, ("checkpoint.save_interval=10", "checkpoint.keep_every=30")),
        (1, (*VALIDATED, "checkpoint.save_interval=4", "checkpoint.keep_best=2")),
        (1, (*VALIDATED, "checkpoint.save_interval=4", "checkpoint.best_level=fully_held_out")),
    ],
)
def test_configs_that_fit(world_size: int, overrides: tuple[str, ...]) -> None:
    check_config(configure(*overrides), world_size)


def test_derived_sizes() -> None:
    config = configure(TP + "4", PP + "2", VP + "2")
    assert data_parallel_size(config, 64) == 8
    assert rows_per_step(config) == 16
    assert micro_batches_per_step(config, 64) == 2
    assert chunk_layers(config) == (2, 2, 2, 2)


CASES = {
    "world_is_divisible": (
        6,
        (TP + "2", PP + "2"),
        "world size: got 6; allowed: a multiple of tensor x pipeline = 2 x 2 = 4; start another number ",
    ),
    "heads_divide_hidden": (
        1,
        ("model.num_attention_heads=5",),
        "model.hidden_size: got 32; allowed: a multiple of model.num_attention_heads 5; change model.",
    ),
    "tensor_parallel_divides_model": (
        16,
        (TP + "16",),
        "model.num_attention_heads: got 8; allowed: a multiple of parallel.tensor_model_parallel_size 16; "
        "change ",
    ),
    "pipeline_layers_fit": (
        2,
        (PP + "2", "parallel.pipeline_layers=[4, 5]"),
        "parallel.pipeline_layers: got [4, 5], 9 layers in 2 chunks; allowed: 8 layers in pipeline x virtual "
        "pipeline = 2 chunks of 1 or more; change parallel.pipeline_layers, or leave it out",
    ),
    "interleaving_has_a_pipeline": (
        1,
        (VP + "2",),
        "virtual_pipeline_model_parallel_size: got 2 with parallel.pipeline_model_parallel_size 1; "
        "allowed: a pipeline of 2 stages or more; raise parallel.pipeline_model_parallel_size",
    ),
    "sequence_parallel_has_tensor_parallel": (
        1,
        ("parallel.sequence_parallel=true",),
        "parallel.sequence_parallel: got true with parallel.tensor_model_parallel_size 1; "
        "allowed: true only with a tensor parallel size of 2 or more; set parallel.sequence_parallel=false",
    ),
    "sequence_parallel_divides_row": (
        4,
        (
            TP + "4",
            "parallel.sequence_parallel=true",
            "data.row_length=66",
            "training.global_batch_positions=66",
        ),
        "data.row_length: got 66; allowed: a multiple of parallel.tensor_model_parallel_size 4; change ",
    ),
    "recompute_fits_chunk": (
        2,
        (PP + "2", *RECOMPUTE[:1], "parallel.recompute_num_layers=3"),
        "parallel.recompute_num_layers: got 3 with recompute_method uniform; allowed: a divisor of 4, "
        "the layers of one pipeline chunk; change parallel.recompute_num_layers",
    ),
    "overlapped_gather_has_what_it_needs": (
        1,
        ("parallel.overlap_param_gather=true",),
        "parallel.overlap_param_gather: got true with overlap_grad_reduce false; allowed: true only if "
        "overlap_grad_reduce is true; set parallel.overlap_grad_reduce=true or ",
    ),
    "flash_attention_is_asked_what_it_computes": (
        1,
        ("model.attention_backend=flash",),
        "model.attention_backend: got flash with model.attention_dropout 0.1 and training.precision bf16; "
        "allowed: flash only with attention dropout 0 in bf16 or fp16; set model.attention_dropout=0, or ",
    ),
    "batch_is_whole_rows": (
        3,
        (),
        "training.global_batch_positions: got 1024; allowed: a multiple of data.row_length x data parallel = "
        "64 x 3 = 192; set it to 1152 or 960",
    ),
    "interleaving_divides_micro_batches": (
        2,
        (PP + "2", VP + "2", "training.global_batch_positions=192"),
        "micro-batches per step of an interleaved pipeline: got 3; allowed: a multiple of "
        "parallel.pipeline_model_parallel_size 2; make training.global_batch_positions a multiple of 128",
    ),
    "weights_have_one_start": (
        1,
        ("checkpoint.initial_weights=weights",),
        "start of the weights: got checkpoint.initial_weights weights and model.initialisation random; "
        "allowed: exactly one of the two; name a checkpoint",
    ),
    "training_data_is_named": (
        1,
        ("data.train_corpus=null", "data.train_plan=null"),
        "data.train_corpus and data.train_plan: got null; allowed: a folder; name what tools",
    ),
    "validation_data_is_complete": (
        1,
        ("data.validation_plans={fully_held_out: p}",),
        "validation: got data.validation_corpus null, 1 data.validation_plans, training.validation_interval "
        "0; allowed: a corpus with one plan or more, or neither of them and interval 0; name the missing one",
    ),
    "warmup_fits_run": (
        1,
        ("optimizer.warmup_steps=11",),
        "optimizer.warmup_steps: got 11; allowed: at most training.steps 10; lower optimizer.warmup_steps",
    ),
    "learning_rate_decays": (
        1,
        ("optimizer.learning_rate=1e-5", "optimizer.min_learning_rate=2e-5"),
        "optimizer.min_learning_rate: got 2e-05; allowed: at most optimizer.learning_rate 1e-05; lower ",
    ),
    "loss_scale_has_room": (
        1,
        ("training.precision=fp16", "optimizer.initial_loss_scale=1", "optimizer.min_loss_scale=2"),
        "optimizer.initial_loss_scale: got 1.0; allowed: at least optimizer.min_loss_scale 2.0; raise ",
    ),
    "kept_steps_are_saved": (
        1,
        ("checkpoint.save_interval=10", "checkpoint.keep_every=25"),
        "checkpoint.keep_every: got 25; allowed: a multiple of checkpoint.save_interval 10; change ",
    ),
    "best_checkpoint_has_a_loss": (
        1,
        (*VALIDATED, "checkpoint.save_interval=5", "checkpoint.keep_best=1"),
        "checkpoint.keep_best: got 1 with checkpoint.save_interval 5, training.validation_interval 2 and 1 "
        "data.validation_plans; allowed: more than 0 only if every step that is saved is validated; name ",
    ),
    "best_level_is_measured": (
        1,
        (*VALIDATED, "checkpoint.best_level=fully_supervised"),
        "checkpoint.best_level: got fully_supervised; allowed: null or one of data.validation_plans: "
        "fully_held_out; change checkpoint.best_level",
    ),
}


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in LAYOUT_RULES + TRAINING_RULES} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_says_what_got_allowed_and_remedy(name: str) -> None:
    world_size, overrides, expected = CASES[name]
    message = refusal(world_size, *overrides)
    assert expected in message.splitlines()[0]
    assert len(message.splitlines()) == 1, f"{name} is not the only rule that fired: {message}"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ffn_hidden_size", ("model.ffn_hidden_size=130",)),
        ("vocab_size", ("model.vocab_size=97",)),
    ],
)
def test_tensor_parallelism_divides_every_sharded_dimension(name: str, changes: tuple[str, ...]) -> None:
    message = refusal(4, TP + "4", *changes)
    assert message.startswith(f"model.{name}: got ") and "parallel.tensor_model_parallel_size 4" in message


@pytest.mark.parametrize("layers", ["[8]", "[0, 8]", "[3, 3, 2]"])
def test_given_layers_fill_every_chunk(layers: str) -> None:
    message = refusal(2, PP + "2", f"parallel.pipeline_layers={layers}")
    assert message.startswith(f"parallel.pipeline_layers: got {layers}")


def test_every_chunk_needs_a_layer() -> None:
    message = refusal(2, PP + "2", VP + "5", "training.global_batch_positions=2048")
    assert message.startswith("model.num_layers: got 8; allowed: at least pipeline x virtual pipeline = 10")


def test_uneven_chunks_are_recomputed_in_groups_that_fit_all() -> None:
    message = refusal(2, PP + "2", "parallel.pipeline_layers=[2, 6]", RECOMPUTE[0], *GROUPS_OF_3)
    assert "got 3 with recompute_method uniform; allowed: a divisor of 2 and 6" in message


def test_block_recompute_reaches_at_most_the_chunk() -> None:
    message = refusal(2, PP + "2", *RECOMPUTE[:1], RECOMPUTE[1] + "block", "parallel.recompute_num_layers=5")
    assert "got 5 with recompute_method block; allowed: at most 4" in message


def test_neither_start_of_the_weights_is_refused() -> None:
    assert "checkpoint.initial_weights null and model.initialisation null" in refusal(
        1, "model.initialisation=null"
    )


def test_a_validation_interval_needs_plans() -> None:
    assert "0 data.validation_plans, training.validation_interval 5" in refusal(
        1, "training.validation_interval=5"
    )


def test_all_problems_are_reported_at_once() -> None:
    lines = refusal(3, "optimizer.warmup_steps=11").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "training.global_batch_positions",
        "optimizer.warmup_steps",
    ]


def test_the_layout_alone_asks_nothing_of_training() -> None:
    config = configure("model.initialisation=null", "data.train_plan=null")
    check_layout(config, 3)
    with pytest.raises(ValueError, match="world size: got 3"):
        check_layout(configure(TP + "2"), 3)


def test_every_numeric_field_has_a_range() -> None:
    sections = {field.name: field.default_factory() for field in fields(Config)}
    optional = {"parallel.virtual_pipeline_model_parallel_size"}
    numeric = {
        key
        for key in known_keys()
        if type(vars(sections[key.partition(".")[0]])[key.partition(".")[2]]) in (int, float)
    }
    assert {row.key for row in RANGES} == numeric | optional


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hidden_dropout=1", "model.hidden_dropout: got 1.0; allowed: 0 <= value < 1; change model."),
        ("model.attention_dropout=-0.1", "model.attention_dropout: got -0.1; allowed: 0 <= value < 1"),
        ("training.steps=0", "training.steps: got 0; allowed: 1 or more; change training.steps"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: got 0.0; allowed: more than 0"),
        ("optimizer.clip_grad=-1", "optimizer.clip_grad: got -1.0; allowed: 0 or more"),
        (VP + "1", "parallel.virtual_pipeline_model_parallel_size: got 1; allowed: 2 or more"),
        (TP + "0", "parallel.tensor_model_parallel_size: got 0; allowed: 1 or more"),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, expected: str) -> None:
    assert refusal(1, override).startswith(expected)
