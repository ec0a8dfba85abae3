"""How many layers each pipeline chunk gets."""

import pytest

from megatron_iml.config import OPT_SIZES, Config, chunk_layers, load_config


def configure(layers: int, pipeline: int, *overrides: str) -> Config:
    shape = (f"model.num_layers={layers}", "model.hidden_size=1024", "model.num_attention_heads=8")
    return load_config(None, [*shape, f"parallel.pipeline_model_parallel_size={pipeline}", *overrides])


@pytest.mark.parametrize(
    ("layers", "pipeline", "expected"),
    [
        (24, 1, (24,)),
        (24, 4, (6, 6, 6, 6)),
        (23, 4, (6, 6, 6, 5)),  # the head's stage is spared first,
        (22, 4, (5, 6, 6, 5)),  # then the embedding's,
        (21, 4, (5, 6, 5, 5)),  # then whoever comes last
        (4, 4, (1, 1, 1, 1)),
    ],
)
def test_layers_are_split_by_cost(layers: int, pipeline: int, expected: tuple[int, ...]) -> None:
    assert chunk_layers(configure(layers, pipeline)) == expected


def test_interleaved_chunks_are_balanced_each() -> None:
    config = configure(10, 2, "parallel.virtual_pipeline_model_parallel_size=2")
    assert chunk_layers(config) == (2, 3, 3, 2)


def test_a_heavy_head_takes_the_place_of_layers() -> None:
    """0.086 x 200,000 words against 12 x 1,024 weights of a layer and feature: 1.4 layers."""
    assert chunk_layers(configure(24, 4, "model.vocab_size=200000")) == (6, 7, 6, 5)


@pytest.mark.parametrize("name", OPT_SIZES)
@pytest.mark.parametrize("pipeline", [2, 4])
def test_every_opt_that_divides_is_split_evenly(name: str, pipeline: int) -> None:
    overrides = [f"model.size={name}", f"parallel.pipeline_model_parallel_size={pipeline}"]
    assert len(set(chunk_layers(load_config(None, overrides)))) == 1


def test_given_layers_are_taken() -> None:
    config = configure(8, 2, "parallel.pipeline_layers=[3, 5]")
    assert config.parallel.pipeline_layers == (3, 5)
    assert chunk_layers(config) == (3, 5)


@pytest.mark.parametrize("text", ["4", "[4, x]", "{a: 4}"])
def test_layers_are_a_list_of_whole_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="parallel.pipeline_layers"):
        configure(8, 2, f"parallel.pipeline_layers={text}")
