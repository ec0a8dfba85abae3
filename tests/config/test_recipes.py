"""The recipes for the real sizes load and fit the world that their first line states."""

import re
from pathlib import Path

import pytest

from megatron_iml.config import OPT_SIZES, check_config, data_parallel_size, load_config, parameter_count

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
GPUS_PER_NODE = 8


def stated_world(recipe: Path) -> int:
    header = re.match(r"# world: (\d+)\n", recipe.read_text())
    assert header is not None, f"{recipe.name} does not begin with `# world: <number of GPUs>`"
    return int(header[1])


def test_every_size_has_a_recipe() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(OPT_SIZES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_fits_its_world(recipe: Path) -> None:
    config, world_size = load_config(recipe), stated_world(recipe)
    check_config(config, world_size)
    assert config.model.size == recipe.stem
    assert config.checkpoint.initial_weights == f"weights/{recipe.stem}"
    assert world_size % GPUS_PER_NODE == 0
    assert (
        config.parallel.tensor_model_parallel_size <= GPUS_PER_NODE
    )  # tensor parallelism stays inside a node


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_states_the_memory_of_its_layout(recipe: Path) -> None:
    config = load_config(recipe)
    shards = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    # bf16 weight and fp32 gradient; fp32 master weight and two moments shared by data-parallel ranks.
    bytes_per_parameter = 6 + 12 / data_parallel_size(config, stated_world(recipe))
    gigabytes = round(parameter_count(config.model) / shards * bytes_per_parameter / 1e9)
    assert gigabytes < 60, f"{recipe.name}: {gigabytes} GB leave too little of 80 GB for activations"
    header = " ".join(line.lstrip("# ") for line in recipe.read_text().splitlines() if line.startswith("#"))
    assert f"= {gigabytes} GB per GPU" in header


@pytest.mark.parametrize(
    ("name", "steps", "positions"), [("opt-30b", 4000, 524_288), ("opt-175b", 8000, 262_144)]
)
def test_the_paper_sizes_have_its_values(name: str, steps: int, positions: int) -> None:
    config = load_config(next(recipe for recipe in RECIPES if recipe.stem == name))
    assert (config.training.steps, config.training.global_batch_positions) == (steps, positions)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (5e-5, 60)
    assert config.optimizer.min_learning_rate == 0
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.95)
    assert config.optimizer.clip_grad == 1.0
    model = config.model
    assert (model.hidden_dropout, model.attention_dropout, model.embedding_dropout) == (0.1, 0.1, 0.1)
