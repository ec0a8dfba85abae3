"""What the arithmetic says a rank holds, against what was built and what was measured."""

import json
from pathlib import Path

import pytest

from megatron_iml.config import OPT_SIZES, Config, check_config, load_config, parameter_count
from megatron_iml.config.memory import rows_in_flight, stage_layers, stage_memory, stage_parameters

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "train_step.jsonl"
GIB = 2**30


def configure(size: str, *overrides: str) -> Config:
    return load_config(None, [f"model.size={size}", *overrides])


def pipeline(stages: int, tensor: int = 1, *overrides: str) -> list[str]:
    return [
        f"parallel.pipeline_model_parallel_size={stages}",
        f"parallel.tensor_model_parallel_size={tensor}",
        *overrides,
    ]


def test_parameters_of_the_stages_of_opt_175b() -> None:
    """As megatron-core's own modules count them; see also tests/training/test_dry_run.py."""
    config = configure("opt-175b", *pipeline(16, 8))
    counts = [stage_parameters(config, stage) for stage in range(16)]
    assert counts == [1_461_869_568, *[1_359_461_376] * 14, 1_436_703_744]


@pytest.mark.parametrize("size", OPT_SIZES)
def test_stages_add_up_to_the_model(size: str) -> None:
    config = configure(size, *pipeline(4))
    copy = config.model.vocab_size * config.model.hidden_size
    stages = sum(stage_parameters(config, stage) for stage in range(4))
    assert stages == parameter_count(config.model) + copy
    assert stage_parameters(configure(size), 0) == parameter_count(config.model)


def test_interleaved_stages_hold_layers_from_far_apart() -> None:
    config = configure("opt-125m", *pipeline(2, 1, "parallel.virtual_pipeline_model_parallel_size=2"))
    assert stage_layers(config, 0) == [range(0, 3), range(6, 9)]
    assert stage_layers(config, 1) == [range(3, 6), range(9, 12)]


@pytest.mark.parametrize("row", [json.loads(line) for line in RESULTS.read_text().splitlines()])
def test_what_was_measured_on_a_gpu_is_within_five_per_cent(row: dict) -> None:
    config = configure(
        row["size"],
        f"data.row_length={row['row_length']}",
        f"training.global_batch_positions={row['rows'] * row['row_length']}",
        *row["overrides"],
    )
    estimate = sum(stage_memory(config, row["ranks"], 0)) / GIB
    assert estimate == pytest.approx(row["peak_memory_gib"], rel=0.05)


def test_bytes_of_a_parameter() -> None:
    """bf16: 2 of weight, 4 of gradient, 12 of master weight and moments over 4 ranks; fp32: 4, 4 and 8."""
    parameters = stage_parameters(configure("opt-125m"), 0)
    bf16 = stage_memory(configure("opt-125m"), 4, 0)
    assert bf16[:3] == (2 * parameters, 4 * parameters, 3 * parameters)
    fp32 = stage_memory(configure("opt-125m", "training.precision=fp32"), 4, 0)
    assert fp32[:3] == (4 * parameters, 4 * parameters, 2 * parameters)


def test_rows_in_flight_by_stage() -> None:
    flat = configure("opt-125m", *pipeline(4, 1, "training.global_batch_positions=16384"))
    assert [rows_in_flight(flat, 4, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = configure(
        "opt-125m",
        *pipeline(2, 1, "parallel.virtual_pipeline_model_parallel_size=2"),
        "training.global_batch_positions=16384",
    )
    # 2 (p - s - 1) + (v - 1) p + 1 chunks of half a stage each.
    assert [rows_in_flight(interleaved, 2, stage) for stage in range(2)] == [5 / 2, 3 / 2]
    short = configure("opt-125m", *pipeline(4, 1, "training.global_batch_positions=4096"))
    assert rows_in_flight(short, 4, 0) == 2


def test_recomputation_keeps_inputs_only() -> None:
    kept = {
        name: stage_memory(configure("opt-1.3b", *overrides), 1, 0).activations
        for name, overrides in {
            "none": (),
            "full": ("parallel.recompute_granularity=full",),
            "by 4": ("parallel.recompute_granularity=full", "parallel.recompute_num_layers=4"),
            "first 12": (
                "parallel.recompute_granularity=full",
                "parallel.recompute_method=block",
                "parallel.recompute_num_layers=12",
            ),
        }.items()
    }
    hidden = 2048 * 2048 * 2
    # Eight-and-four of [T, h] a layer are kept, or its input alone and one layer whole.
    assert kept["none"] - kept["full"] == pytest.approx((24 * 12 - 24 - 12) * hidden)
    assert kept["by 4"] - kept["full"] == pytest.approx((6 + 4 * 12 - 24 - 12) * hidden)
    assert kept["first 12"] - kept["full"] == pytest.approx((12 * 12 + 12 - 24) * hidden)


def test_sequence_parallelism_cuts_what_tensor_parallelism_leaves_whole() -> None:
    batch = "training.global_batch_positions=2048"
    plain = configure("opt-1.3b", *pipeline(1, 4), batch)
    sequence = configure("opt-1.3b", *pipeline(1, 4), batch, "parallel.sequence_parallel=true")
    check_config_of_layout(sequence)
    saved = stage_memory(plain, 4, 0).activations - stage_memory(sequence, 4, 0).activations
    assert saved == pytest.approx(24 * 4 * (1 - 1 / 4) * 2048 * 2048 * 2)


def check_config_of_layout(config: Config) -> None:
    with pytest.raises(ValueError, match="data.train_corpus"):
        check_config(config, 4)  # the data is all that is missing


def test_the_last_stage_makes_logits_of_a_chunk_of_targets() -> None:
    """2,048 targets x 8 words more x 2 bytes; the other stages know no words."""
    sizes = [
        [
            stage_memory(
                configure("opt-125m", *pipeline(2), f"model.vocab_size={words}"), 2, stage
            ).activations
            for stage in range(2)
        ]
        for words in (50_272, 50_280)
    ]
    assert [more - less for less, more in zip(*sizes, strict=True)] == [0, 2048 * 8 * 2]
