"""What commands share: options of long work, and what they say of a mistake."""

import argparse

import pytest

from megatron_iml import command
from megatron_iml.command import add_work_arguments, refuse, run_command


def parser(parts: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    add_work_arguments(made, "rows", 500, parts)
    return made


def test_defaults_and_values_of_long_work() -> None:
    assert vars(parser(None).parse_args([])) == {"workers": 1, "log_interval": 500}
    given = parser("shards").parse_args(["--workers", "3", "--job-index", "2", "--num-jobs", "4"])
    assert vars(given) == {"workers": 3, "log_interval": 500, "job_index": 2, "num_jobs": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "argument --workers: got 0, expected a whole number of 1 or more"),
        (["--log-interval", "-1"], "argument --log-interval: got -1, expected a whole number of 1 or more"),
        (["--workers", "two"], "argument --workers: got two, expected a whole number of 1 or more"),
        (["--job-index", "1"], "unrecognized arguments: --job-index 1"),
    ],
)
def test_mistakes_in_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser(None).parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "c"], "no such option: --corpus; allowed: --help, --input, -h"),
        (["--inputs=c"], "no such option: --inputs; did you mean --input? allowed"),
        # An abbreviation is no option either.
        (["--inp", "c"], "no such option: --inp; did you mean --input? allowed"),
        ([], "the following arguments are required: --input"),
    ],
)
def test_an_unknown_option_is_named_before_one_that_is_missing(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = command.command_parser("d")
    parser.add_argument("--input", required=True)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_first_rank_speaks_and_the_others_let_it_leave_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(command.time, "sleep", waits.append)
    for rank, said, waited in (("0", "error: no corpus\n", []), ("1", "", [command.SILENT_RANK_SECONDS])):
        monkeypatch.setenv("RANK", rank)
        assert refuse(ValueError("no corpus")) == 2
        assert (capsys.readouterr().err, waits) == (said, waited)


def test_a_mistake_is_one_line_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken() -> None:
        raise FileNotFoundError("no bench here")

    assert run_command(mistaken) == 2
    assert capsys.readouterr().err == "error: no bench here\n"
    assert (run_command(lambda: None), run_command(lambda: 3)) == (0, 3)
    with pytest.raises(KeyError):
        run_command(lambda: {}["bug"])
