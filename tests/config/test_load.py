"""Loading: types, strictness, overrides, resolution, and the way back to YAML."""

from dataclasses import asdict, replace
from pathlib import Path
from textwrap import dedent

import pytest

from megatron_iml.config import Config, load_config, save_config
from megatron_iml.config.convert import known_keys

TINY = "model: {num_layers: 2, hidden_size: 8, num_attention_heads: 2}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "train.yaml"
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, TINY + text), overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).splitlines()[0]


def test_recomputation_modes_that_recurse_or_crash_cannot_be_named() -> None:
    for mode in ("mlp", "layernorm", "core_attn"):
        with pytest.raises(ValueError, match="recompute_granularity: .* allowed: none, selective, full"):
            load_config(None, ["model.size=opt-125m", f"parallel.recompute_granularity={mode}"])


def test_defaults_need_only_a_shape(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config.training == Config().training
    assert (config.model.num_layers, config.model.ffn_hidden_size) == (2, 32)


def test_numbers_in_scientific_notation_keep_their_field_type(tmp_path: Path) -> None:
    # YAML 1.1 reads 5e-5 and 4e3 as texts, 4.0e+3 as a float, and 524_288 as an int.
    text = """
    optimizer: {learning_rate: 5e-5, clip_grad: 1}
    training: {steps: 4e3, global_batch_positions: 524_288}
    checkpoint: {keep_last: 4.0e+0}
    """
    config = load(tmp_path, dedent(text))
    assert config.optimizer.learning_rate == 5e-5
    assert isinstance(config.optimizer.clip_grad, float)
    for value, expected in (
        (config.training.steps, 4000),
        (config.training.global_batch_positions, 524288),
        (config.checkpoint.keep_last, 4),
    ):
        assert value == expected and type(value) is int


def test_large_integers_are_exact(tmp_path: Path) -> None:
    assert load(tmp_path, f"training: {{seed: {2**53 + 1}}}").training.seed == 2**53 + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training: {steps: 1.5}", "training.steps: got 1.5 (float); allowed: a whole number"),
        ("training: {steps: true}", "training.steps: got True (bool); allowed: a whole number"),
        ("training: {steps: many}", "training.steps: got 'many' (str); allowed: a whole number"),
        ("training: {steps: [4]}", "training.steps: got [4] (list); allowed: a whole number"),
        ("training: {steps: null}", "training.steps: got None (NoneType); allowed: a whole number"),
        ("optimizer: {learning_rate: .nan}", "optimizer.learning_rate: got nan (float); allowed: a finite"),
        (
            "parallel: {sequence_parallel: 1}",
            "parallel.sequence_parallel: got 1 (int); allowed: true or false",
        ),
        (
            "checkpoint: {initial_weights: 125}",
            "initial_weights: got 125 (int); allowed: a text; put it in quotes",
        ),
        ("training: {precision: bf8}", "training.precision: got 'bf8'; allowed: bf16, fp16, fp32"),
        ("data: {validation_plans: plan}", "data.validation_plans: got 'plan'; allowed: a mapping"),
        ("data: {validation_plans: {a: 1}}", "data.validation_plans.a: got 1 (int); allowed: a text"),
        ("training: 4000", "training: got 4000; allowed: a mapping"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'train.yaml'}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("text", "got", "nearest"),
    [
        ("training: {stpes: 4}", "training.stpes", "training.steps"),
        ("training: {learning_rate: 1}", "training.learning_rate", "optimizer.learning_rate"),
        ("steps: 4", "steps", "training.steps"),
        # Not checkpoint.save_interval, which is as near.
        ("checkpoint: {log_interval: 4}", "checkpoint.log_interval", "training.log_interval"),
        ("trainign: {steps: 4}", "trainign", "training"),
        ("optimizer: {adam_beta: 0}", "optimizer.adam_beta", "optimizer.adam_beta1"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, text: str, got: str, nearest: str) -> None:
    message = refusal(tmp_path, text)
    assert f"train.yaml: unknown key: got {got}; allowed " in message
    assert nearest in message.partition("did you mean ")[2]


def test_an_unknown_key_lists_the_fields_of_its_section(tmp_path: Path) -> None:
    assert "allowed in checkpoint: initial_weights, save_interval," in refusal(
        tmp_path, "checkpoint: {zzz: 1}"
    )


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "training:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    assert "line 5: got the key steps twice" in message


def test_a_key_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("training:\n  [steps]: 3\n")
    with pytest.raises(ValueError, match=r"got text that is not YAML; .*found unhashable key") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_section_with_everything_commented_out_is_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "training:\n  # steps: 4\n").training == Config().training


def test_text_that_is_not_yaml_is_refused_with_its_line(tmp_path: Path) -> None:
    message = refusal(tmp_path, "training: {steps: 4\n")
    assert "got text that is not YAML" in message and "line 3" in message


def test_a_missing_file_names_the_ones_beside_it(tmp_path: Path) -> None:
    write(tmp_path, TINY)
    with pytest.raises(FileNotFoundError) as caught:
        load_config(tmp_path / "trian.yaml")
    assert str(caught.value).startswith(f"config file: got {tmp_path / 'trian.yaml'}, which is not a file")
    assert str(caught.value).endswith("has train.yaml")


def test_overrides_apply_in_order_and_win_over_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "training: {steps: 1}",
        "training.steps=2e1",
        "training.steps=30",
        "parallel.sequence_parallel=true",
        "optimizer.learning_rate=1e-5",
        "parallel.virtual_pipeline_model_parallel_size=2",
        "data.validation_plans={fully_held_out: plan/a, fully_supervised: plan/b}",
    )
    assert config.training.steps == 30
    assert config.parallel.sequence_parallel is True
    assert config.optimizer.learning_rate == 1e-5
    assert config.parallel.virtual_pipeline_model_parallel_size == 2
    assert config.data.validation_plans == {"fully_held_out": "plan/a", "fully_supervised": "plan/b"}


def test_an_override_of_a_text_takes_it_as_it_stands(tmp_path: Path) -> None:
    config = load(tmp_path, "", "training.output_directory=2024", "checkpoint.initial_weights=no=1")
    assert config.training.output_directory == "2024"
    assert config.checkpoint.initial_weights == "no=1"


def test_an_override_of_null_empties_an_optional_field(tmp_path: Path) -> None:
    text = "checkpoint: {initial_weights: opt}\nmodel: {initialisation: random}"
    config = load_config(write(tmp_path, TINY.replace("model: {", "model: {initialisation: random, ")))
    assert config.model.initialisation == "random"
    path = write(tmp_path, TINY + text.splitlines()[0])
    assert load_config(path, ["checkpoint.initial_weights=null"]).checkpoint.initial_weights is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "override training.steps: got no '='; allowed: section.field=value"),
        ("training.stpes=4", "unknown key: got training.stpes; allowed in training: "),
        ("steps=4", "did you mean training.steps?"),
        ("training=4", "unknown key: got training; allowed in training: "),
        (
            "training.steps=x",
            "override training.steps=x: training.steps: got 'x' (str); allowed: a whole number",
        ),
        ("training.steps=[", "override training.steps=[: got text that is not YAML"),
        ("training.precision=bf8", "allowed: bf16, fp16, fp32"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in refusal(tmp_path, "", override)


def test_size_fills_the_shape_and_given_fields_win(tmp_path: Path) -> None:
    model = load_config(None, ["model.size=opt-125m", "model.num_layers=2"]).model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (2, 768, 12)
    assert model.ffn_hidden_size == 4 * 768


def test_a_model_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, ["model.num_layers=2"])
    assert "command line: model: got no hidden_size, num_attention_heads; allowed: 1 or more" in str(
        caught.value
    )


def test_a_saved_config_loads_back_equal(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "optimizer: {learning_rate: 3.3e-5, adam_eps: 1e-8}\ntraining: {output_directory: '2024'}",
        "data.validation_plans={fully_held_out: plan/a}",
    )
    path = tmp_path / "resolved.yaml"
    save_config(config, path)
    assert load_config(path) == config


def test_every_field_survives_the_way_through_yaml(tmp_path: Path) -> None:
    # Move every number off its default, so that a field that is not written or not read shows.
    config = load(tmp_path, "")
    for name, section in vars(config).items():
        numbers = {key: value + 1 for key, value in vars(section).items() if type(value) in (int, float)}
        config = replace(config, **{name: replace(section, **numbers)})
    path = tmp_path / "resolved.yaml"
    save_config(config, path)
    assert load_config(path) == config
    written = [f"{name}.{key}" for name, section in asdict(config).items() for key in section]
    assert tuple(written) == known_keys()
