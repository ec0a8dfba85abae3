"""Any layout on one CPU: every recipe adds up, and what would not add up is refused."""

import dataclasses
import re
from pathlib import Path

import pytest
from helpers import tiny_config

from megatron_iml import train
from megatron_iml.config import Config, ParallelConfig, load_config, parameter_count, place_of_rank
from megatron_iml.training.dry_run import (
    RankAccount,
    account_of,
    check_accounts,
    first_row_targets,
    representative_ranks,
)

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
LARGEST = next(recipe for recipe in RECIPES if recipe.stem == "opt-175b")
WORLD_OF_1024 = [
    "parallel.pipeline_model_parallel_size=16",
    "parallel.virtual_pipeline_model_parallel_size=null",
]


def stated_world(recipe: Path) -> int:
    return int(re.match(r"# world: (\d+)", recipe.read_text())[1])  # type: ignore[index]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_recipe_adds_up(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    world_size = stated_world(recipe)
    status = train.main(["--config", str(recipe), "--dry-run", "--world-size", str(world_size)])
    assert status == 0
    said = capsys.readouterr().out
    assert f"parameters: {parameter_count(load_config(recipe).model):,} in " in said
    # Padding is no fault, but these sizes have none.
    assert re.search(r"gradient buckets: \d+, 0 padded", said)


def accounts(config: Config, world_size: int, ranks: list[int]) -> list[RankAccount]:
    return [account_of(config, rank, world_size, num_targets=176) for rank in ranks]


def test_ranks_of_opt_175b_on_1024() -> None:
    """A rank of the first, of a middle and of the last stage, to the element."""
    first, middle, last = accounts(load_config(LARGEST, WORLD_OF_1024), 1024, [0, 64, 1023])
    assert [account.place for account in (first, middle, last)] == [(0, 0, 0), (0, 0, 1), (7, 7, 15)]
    held = [sum(tensor.elements for tensor in a.tensors.values()) for a in (first, middle, last)]
    assert held == [1_461_869_568, 1_359_461_376, 1_436_703_744]
    assert [len(account.buckets) for account in (first, middle, last)] == [20, 1, 2]
    # An eighth of each bucket.
    assert [a.shard_elements for a in (first, middle, last)] == [182_733_696, 169_932_672, 179_587_968]
    # A row of 2,048 over 8 tensor ranks; then the losses of its targets.
    assert [a.outputs for a in (first, middle, last)] == [[(256, 1, 12288)], [(256, 1, 12288)], [(176,)]]


@pytest.mark.slow
def test_the_grid_of_1024_ranks() -> None:
    """Every data rank and every tensor rank of every stage, 240 ranks; all pairs would take four times as
    long.

    A rank's tensors and buckets are its stage's, its shard is its stage's and data rank's: where the data
    ranks of one tensor rank agree with one another, and the tensor ranks of one data rank, so do all pairs.
    """
    config = load_config(LARGEST, WORLD_OF_1024)
    places = {rank: place_of_rank(config, 1024, rank) for rank in range(1024)}
    ranks = [rank for rank, place in places.items() if place.tensor == 0 or place.data == 0]
    grid = accounts(config, 1024, ranks)
    assert len(grid) == 16 * (8 + 7)
    said = check_accounts(config, 1024, grid)
    assert said[1].startswith("parameters: 174,604,468,224 in 1,156 tensors, each owned by one stage")
    shards = {(account.place.stage, account.place.data): account.shard_elements for account in reversed(grid)}
    for account in grid:
        assert account.shard_elements == shards[account.place.stage, account.place.data], account.place
    # What the ranks update, less the copy of the tied embedding, is the model: each element once.
    copy = config.model.vocab_size * config.model.hidden_size
    replicated = sum(
        tensor.elements * 7
        for account in grid
        if account.place.tensor == 0 and account.place.data == 0
        for tensor in account.tensors.values()
        if not tensor.is_cut
    )
    assert 8 * sum(shards.values()) == 174_604_468_224 + copy + replicated


TINY = tiny_config(
    "bf16",
    ParallelConfig(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        sequence_parallel=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    ),
    num_layers=5,
)
TINY = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, row_length=16))


def test_a_small_grid_whole() -> None:
    """Uneven chunks (1, 2, 1, 1), three data ranks: buckets are padded, and still nothing is lost."""
    grid = accounts(TINY, 12, list(range(12)))
    assert representative_ranks(TINY, 12) == [0, 5, 6, 11]
    said = check_accounts(TINY, 12, grid)
    assert f"parameters: {parameter_count(TINY.model):,} in 64 tensors" in said[1]
    assert any(bucket.padding for account in grid for bucket in account.buckets)
    for stage in range(2):
        for tensor in range(2):
            peers = [a for a in grid if (a.place.stage, a.place.tensor) == (stage, tensor)]
            held = sum(tensor.elements for tensor in peers[0].tensors.values())
            assert sum(account.shard_elements for account in peers) == held


def test_what_does_not_add_up_is_refused() -> None:
    first, last = accounts(TINY, 12, [0, 11])
    norm = "decoder.layers.0.input_layernorm.weight"
    lacking = dataclasses.replace(first, tensors={k: v for k, v in first.tensors.items() if k != norm})
    with pytest.raises(RuntimeError, match=r"stage=0\) holds .* parameters, not "):
        check_accounts(TINY, 12, [lacking, last])
    # A layer built on both stages, in the place of one that neither has.
    twice = {k.replace("layers.4.", "layers.0."): v for k, v in last.tensors.items()}
    with pytest.raises(RuntimeError, match=r"decoder.layers.0\..*: owned by stage 0, and by stage 1"):
        check_accounts(TINY, 12, [first, dataclasses.replace(last, tensors=twice)])
    with pytest.raises(RuntimeError, match=r"the ranks add up to .* parameters, the model has"):
        check_accounts(TINY, 12, [first])


def test_without_its_data_a_row_is_assumed() -> None:
    targets, origin = first_row_targets(load_config(LARGEST))
    assert (targets, origin) == (176, "assumed: plan/train or corpus/train is not here")


def test_a_world_that_does_not_divide_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--config", str(LARGEST), "--dry-run", "--world-size", "100"]) == 2
    assert "error: world size: got 100; allowed: a multiple of tensor x pipeline" in capsys.readouterr().err


def test_a_world_size_is_no_option_of_training(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        train.main(["--config", str(LARGEST), "--world-size", "128"])
    assert "--world-size goes with --explain or --dry-run" in capsys.readouterr().err
