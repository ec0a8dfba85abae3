"""The command's ending: a mistake all ranks agree on is one line, anything else keeps its traceback."""

from pathlib import Path

import pytest
from helpers import tiny_config

from megatron_iml import train
from megatron_iml.training import loop, prepare
from megatron_iml.training.agree import AgreedMistake


def fail_with(error: Exception):
    def action(*unused):
        raise error

    return action


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(train, "load_config", lambda path, overrides: tiny_config())
    monkeypatch.setattr(train, "check_config", lambda config, world_size: None)
    return ["--config", str(Path("run.yaml"))]


def test_an_agreed_mistake_is_one_line(arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prepare, "prepare", fail_with(AgreedMistake("no plan")))
    assert train.main(arguments) == 2
    assert capsys.readouterr().err.endswith("error: no plan\n")


def test_a_failure_of_one_rank_is_not_swallowed(arguments, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(prepare, "prepare", lambda config, layout: None)
    monkeypatch.setattr(loop, "train", fail_with(ValueError("in the middle of a step")))
    with pytest.raises(ValueError, match="in the middle"):
        try:
            train.main(arguments)
        finally:
            from megatron_iml.parallel.groups import stop_distributed

            stop_distributed()


def test_what_cannot_be_read_is_a_mistake_too(arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(train, "load_config", fail_with(PermissionError("run.yaml is not yours")))
    assert train.main(arguments) == 2
    assert capsys.readouterr().err == "error: run.yaml is not yours\n"


@pytest.mark.parametrize("size", ["0", "-4", "many"])
def test_a_world_has_one_rank_or_more(arguments, size: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--explain", "--world-size", size])
    assert stopped.value.code == 2
    assert f"--world-size: got {size}, expected a whole number of 1 or more" in capsys.readouterr().err
