"""A checkpoint that a run cannot go on from is refused before the model is built."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_config

from megatron_iml.checkpoint.record import Record, RunState, StoredFile, write_record
from megatron_iml.config import Config
from megatron_iml.training import prepare
from megatron_iml.training.prepare import _check_start, changed_fields, open_loader

# 2 rows a step, 4 steps: 8 rows, of which the checkpoint has seen 6.
STATE = RunState(3, 6, "abc", "corpus")


def config_of(**changes: object) -> Config:
    """The tiny config with 2 rows a step; keywords replace fields of whichever section has them."""
    config = dataclasses.replace(tiny_config(), data=dataclasses.replace(tiny_config().data, row_length=64))
    for name, value in changes.items():
        section = "checkpoint" if name == "resume" else "training"
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


FILES = {"optimizer_00000.distcp": StoredFile(1, "")}


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    write_record(folder, Record(STATE, dataclasses.asdict(tiny_config()), 1, {}, {}, "", FILES))
    return folder


@pytest.mark.parametrize(
    ("changes", "plan", "said"),
    [
        ({"resume": False}, {}, "checkpoint.resume is false"),
        ({}, {"fingerprint": "xyz"}, "was trained on plan abc, data.train_plan is xyz"),
        ({"steps": 2}, {}, "training.steps: got 2, but checkpoint .* has taken 3 steps; allowed: 3 or more"),
        (
            {"global_batch_positions": 256},
            {},
            "has 8 rows; 6 are consumed and 1 steps of 4 rows are left",
        ),
    ],
)
def test_refused(newest: Path, changes: dict, plan: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _check_start(
            config_of(**changes), newest, SimpleNamespace(**{"fingerprint": "abc", "num_rows": 8} | plan)
        )


@pytest.mark.parametrize("changes", [{}, {"steps": 3}])
def test_accepted(newest: Path, changes: dict) -> None:
    """Before the last step, and again after a finished run."""
    _check_start(config_of(**changes), newest, SimpleNamespace(fingerprint="abc", num_rows=8))


def test_a_new_run_needs_rows_for_all_its_steps() -> None:
    plan = SimpleNamespace(fingerprint="abc", num_rows=7)
    with pytest.raises(ValueError, match="has 7 rows; 4 steps of 2 rows need 8: build a plan with --rows 8"):
        _check_start(config_of(), None, plan)


def test_weights_alone_are_no_state_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    write_record(folder, Record(STATE, dataclasses.asdict(tiny_config()), 1, {}, {}, "", {}))
    with pytest.raises(ValueError, match="holds weights only.*checkpoint.initial_weights"):
        _check_start(config_of(), folder, SimpleNamespace(fingerprint="abc", num_rows=8))


def test_what_a_resumed_run_does_otherwise_is_named() -> None:
    before = json.loads(json.dumps(dataclasses.asdict(config_of())))
    assert changed_fields(before, dataclasses.asdict(config_of())) == []
    after = dataclasses.asdict(config_of(seed=7))
    assert changed_fields(before, after) == [f"training.seed: {config_of().training.seed} -> 7"]
    # A field that the older configuration did not have yet.
    del before["training"]["seed"]
    assert changed_fields(before, after) == ["training.seed: None -> 7"]


def test_a_level_without_a_plan_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(corpus: Path, plan: Path, config: Config) -> str:
        if plan.name == "held":
            raise FileNotFoundError("no plan in held")
        return "loader"

    monkeypatch.setattr(prepare, "open_loader", opened)
    data = dataclasses.replace(
        config_of().data, train_corpus="c", train_plan="p", validation_plans={"fully_held_out": "held"}
    )
    with pytest.raises(FileNotFoundError, match="^data.validation_plans.fully_held_out: no plan in held, or"):
        prepare._open_data(dataclasses.replace(config_of(), data=data))


def test_no_such_weights(tmp_path: Path) -> None:
    config = tiny_config()
    config = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, initial_weights=str(tmp_path / "no"))
    )
    with pytest.raises(FileNotFoundError, match="no such folder"):
        _check_start(config, None, SimpleNamespace(fingerprint="abc", num_rows=8))


@pytest.mark.parametrize(("backend", "branches"), [("flash", True), ("flash", False), ("triton", True)])
def test_a_plan_with_shared_prefixes_needs_attention_that_knows_them(
    backend: str, branches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny_config(attention_backend=backend), data=config_of().data)
    plan = open_these(monkeypatch, shares_prefixes=branches)
    if backend == "flash" and branches:
        with pytest.raises(ValueError, match="got flash with plan p, whose documents share prefixes;"):
            open_loader(Path("c"), Path("p"), config)
    else:
        assert open_loader(Path("c"), Path("p"), config).plan is plan


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"max_positions": 65}, "documents of up to 65 positions, .* is 64: .* --max-positions 64"),
        ({"row_length": 128}, "rows of 128 positions, data.row_length is 64: set data.row_length=128"),
        ({"padded_vocab_size": 104}, r"vocabulary of 104 ids \(padded\), .* is 96: set model.vocab_size=104"),
    ],
)
def test_data_of_another_model_is_refused(found: dict, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    open_these(monkeypatch, **found)
    with pytest.raises(ValueError, match=said):
        open_loader(Path("c"), Path("p"), config_of())


def open_these(monkeypatch: pytest.MonkeyPatch, **found: object) -> SimpleNamespace:
    """Let every folder hold a plan and a corpus that fit the tiny model but for what is given."""
    fitting = {"row_length": 64, "max_positions": 64, "shares_prefixes": False, "padded_vocab_size": 96}
    both = SimpleNamespace(**fitting | found, corpus_fingerprint="c", fingerprint="c")
    monkeypatch.setattr(prepare.Plan, "open", lambda folder: both)
    monkeypatch.setattr(prepare.Corpus, "open", lambda folder: both)
    return both
