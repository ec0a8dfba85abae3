"""The published sizes: exact parameter counts, and names that are not to be had."""

from pathlib import Path

import pytest

from megatron_iml.config import OPT_SIZES, load_config, opt_size, parameter_count

PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
}


def test_every_size_has_a_published_count() -> None:
    assert set(OPT_SIZES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    model = load_config(None, [f"model.size={name}"]).model
    assert parameter_count(model) == PUBLISHED[name]


def test_parameter_count_follows_a_narrower_feed_forward() -> None:
    whole = load_config(None, ["model.size=opt-125m"]).model
    narrow = load_config(None, ["model.size=opt-125m", "model.ffn_hidden_size=3071"]).model
    # One unit less: a row of fc1 with its bias, and a column of fc2, in each of 12 layers.
    assert parameter_count(whole) - parameter_count(narrow) == 12 * (768 + 1 + 768)


def test_350m_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match="opt-350m") as caught:
        opt_size("opt-350m")
    first, reason = str(caught.value).split("\n")
    assert "use opt-125m or opt-1.3b" in first
    assert "after the residual sum" in reason and "512-wide" in reason


def test_unknown_size_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model: {size: opt-6.7}\n")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: model.size: got 'opt-6.7'; allowed: opt-125m, ")
    assert "did you mean opt-6.7b" in message


def test_a_name_unlike_any_other_gets_the_whole_list() -> None:
    with pytest.raises(ValueError, match=f"did you mean {' or '.join(OPT_SIZES)}"):
        opt_size("gemma")
