"""What a user can get wrong, and the message: what, got, allowed, remedy; once, not once per rank."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from end_to_end.conftest import ROOT, finish, launch, rows_of, train_command

from megatron_iml.train import main as train


def run(chain: Path, tmp_path: Path, *overrides: str) -> int:
    """Train in this process as a world of one."""
    return train(
        ["--config", str(chain / "train.yaml"), f"training.output_directory={tmp_path / 'run'}", *overrides]
    )


@pytest.fixture
def copy(chain: Path, tmp_path: Path) -> Path:
    """The chain's corpus and plan, to be damaged."""
    for name in ("corpus", "plan"):
        shutil.copytree(chain / name, tmp_path / name)
    return tmp_path


CONFIG_MISTAKES = {
    "unknown key": ("training.step=5", ["training.step", "steps"]),
    "missing file": ("data.train_plan=nowhere", ["nowhere", "build_plan.py"]),
    "wrong vocabulary": (
        "model.vocab_size=328",
        ["vocabulary of 320", "model.vocab_size is 328", "model.vocab_size=320"],
    ),
    "heads": ("model.num_attention_heads=3", ["num_attention_heads", "3", "hidden_size"]),
    "too few rows": ("training.steps=41", ["160 rows", "41 steps", "need 164", "--rows 164"]),
    "row length": ("data.row_length=64", ["rows of 128", "data.row_length is 64", "data.row_length=128"]),
    "opt-350m": ("model.size=opt-350m", ["opt-350m"]),
    "two starts": ("checkpoint.initial_weights=opt-125m", ["initial_weights", "initialisation"]),
}


@pytest.mark.parametrize(("override", "words"), CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES.keys())
def test_mistakes_in_the_config(chain, tmp_path, capsys, override, words):
    assert run(chain, tmp_path, override) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


def test_world_that_does_not_fit_the_layout(chain, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(chain, tmp_path, "parallel.tensor_model_parallel_size=2") == 2
    message = capsys.readouterr().err
    assert "world size: got 3" in message and "2 x 1 = 2" in message


def test_plan_of_another_corpus(chain, copy, capsys):
    corpus = f"data.train_corpus={chain / 'corpus' / 'validation'}"
    assert run(chain, copy, corpus) == 2
    message = capsys.readouterr().err
    assert "was made from corpus" in message and "build_plan.py" in message


def test_truncated_tokens(chain, copy, capsys):
    binary = next((copy / "corpus" / "train").glob("*.bin"))
    size = binary.stat().st_size
    binary.write_bytes(binary.read_bytes()[:-2])
    assert run(chain, copy, f"data.train_corpus={copy / 'corpus' / 'train'}") == 2
    message = capsys.readouterr().err
    assert all(word in message for word in (binary.name, str(size), str(size - 2))), message


def test_checkpoint_of_another_model_size(chain, tmp_path, capsys):
    folder = tmp_path / "run"
    finish(
        launch(
            1, "megatron_iml.train", "--config", chain / "train.yaml", f"training.output_directory={folder}"
        )
    )
    assert len(rows_of(folder)) == 40
    assert run(chain, tmp_path, "model.num_layers=3") == 2
    message = capsys.readouterr().err
    assert "another size" in message and "num_layers 3 here, 2 there" in message


def test_empty_source_folder_and_a_line_without_target(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "A__B__c.jsonl").write_text('{"src": "a", "tgt": "b"}\n{"src": "a"}\n')
    (tmp_path / "splits.yaml").write_text("seed: 1\n")
    for folder, words in (("empty", ["empty"]), ("broken", ["A__B__c.jsonl:2", "tgt"])):
        sources = [{"reader": "source_target", "folder": str(tmp_path / folder)}]
        (tmp_path / "bench.yaml").write_text(yaml.safe_dump({"sources": sources, "splits": "splits.yaml"}))
        command = [sys.executable, str(ROOT / "tools" / "preprocess" / "build_bench.py")]
        arguments = ["--config", str(tmp_path / "bench.yaml"), "--output", str(tmp_path / "bench")]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, "one clear line"
        assert not (tmp_path / "bench").exists()


def test_a_mistake_that_all_ranks_find_is_said_once(chain, tmp_path):
    process = launch(2, *train_command(chain, tmp_path / "run"), "data.train_plan=nowhere")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1, error
