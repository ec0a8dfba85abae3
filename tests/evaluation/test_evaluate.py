"""Both commands with a tiny random OPT: the same report under every layout, resumption, mistakes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import CPU_ENVIRONMENT

from megatron_iml.checkpoint.record import RunState
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, TrainingConfig, load_config
from megatron_iml.data.corpus.tokenizer import Tokenizer, train_byte_level_bpe
from megatron_iml.evaluate import main as evaluate
from megatron_iml.evaluation.open_model import fingerprint_weights
from megatron_iml.generate import main as generate
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import start_distributed, stop_distributed
from megatron_iml.training.engine import build_engine

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "vocab_size": 264,
    "max_position_embeddings": 32,
    "init_method_std": 0.2,
    "initialisation": "random",
    "kernel_backend": "reference",
}


@pytest.fixture
def config(tmp_path: Path, bench_folder: Path) -> Path:
    """A tiny random model, in fp32 so that layouts agree, on the bench of two tasks."""
    train_byte_level_bpe(["a b c"], vocab_size=260, folder=tmp_path / "tokenizer")
    content = {
        "model": MODEL,
        "data": {"row_length": 48},
        "training": {"precision": "fp32", "output_directory": str(tmp_path / "run")},
        "evaluation": {
            "bench": str(bench_folder),
            "tokenizer": str(tmp_path / "tokenizer"),
            "max_new_tokens": 6,
            "generation_batch_size": 2,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "config.yaml"


def run(main: Callable[[Sequence[str]], int], *arguments: object) -> int:
    """Run a command in this process, as a world of one."""
    return main([str(argument) for argument in arguments])


def run_on_two_ranks(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        + ["megatron_iml.evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=CPU_ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def candidate_scores(folder: Path) -> list[float]:
    task = json.loads((folder / "tasks" / "flan__cat__pick.json").read_text())
    return [score for example in task["examples"] for score in example["candidate_scores"]]


def answers(folder: Path) -> list[str]:
    return [
        e["answer"] for e in json.loads((folder / "tasks" / "sni__cat__say.json").read_text())["examples"]
    ]


def test_report_resumption_and_baseline(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_start = ("--config", config, "--checkpoint", "start")
    assert run(evaluate, *from_start) == 0
    assert "fully held out" in capsys.readouterr().out
    start = tmp_path / "run" / "evaluation" / "start"
    report = report_of(start)
    assert report["conditions"]["inference_prefix"] == "none"
    assert [task["estimate"]["count"] for task in report["tasks"]] == [5, 3]
    assert (start / "levels.png").is_file()

    # What is done is not done again: a mark left in a task's file survives.
    task = start / "tasks" / "sni__cat__say.json"
    task.write_text(task.read_text().replace('"id":"s0"', '"id":"mark"'))
    assert run(evaluate, *from_start, "--baseline", start) == 0
    assert '"mark"' in task.read_text()
    assert report_of(start)["baseline"]["overall"] == report["overall"]

    # Another prefix is another evaluation, with other likelihoods, and may be compared.
    prefixed = ("--output", tmp_path / "prefixed", "--baseline", start, "model.inference_prefix=eos")
    assert run(evaluate, *from_start, *prefixed) == 0
    assert candidate_scores(tmp_path / "prefixed") != candidate_scores(start)


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_give_the_report_of_one(config: Path, tmp_path: Path, tensor: int) -> None:
    arguments = ("--config", config, "--checkpoint", "start", "--output")
    assert run(evaluate, *arguments, tmp_path / "one") == 0
    run_on_two_ranks(*arguments, tmp_path / "two", f"parallel.tensor_model_parallel_size={tensor}")
    assert report_of(tmp_path / "one") == report_of(tmp_path / "two")
    assert answers(tmp_path / "one") == answers(tmp_path / "two")
    # fp32 sums in another order: a few units in the last place of likelihoods around -20.
    assert candidate_scores(tmp_path / "two") == pytest.approx(candidate_scores(tmp_path / "one"), abs=1e-4)


def test_generate_answers_prompts_in_order(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from_start = ("--config", config, "--checkpoint", "start")
    (tmp_path / "prompts.jsonl").write_text('{"src": "0:"}\n{"id": "b", "src": "a much longer prompt:"}\n')
    files = ("--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "answers.jsonl")
    assert run(generate, *from_start, *files) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["id"], row["src"]) for row in rows] == [("1", "0:"), ("b", "a much longer prompt:")]

    capsys.readouterr()
    assert run(generate, *from_start, "--prompt", "0:") == 0
    assert json.loads(capsys.readouterr().out) == {**rows[0], "id": "0"}


def test_generate_says_that_there_are_no_prompts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for prompts, reason in (
        (empty, "which is empty; allowed:"),
        (tmp_path / "no", "which is not there; allowed:"),
    ):
        arguments = ("--config", config, "--checkpoint", "start", "--prompts", prompts)
        assert run(generate, *arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: --prompts: got {prompts}, {reason}")


def test_generate_cuts_prompts_where_the_evaluation_does(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 8 positions hold 9 tokens, 6 of them the answer: 3 bytes of a prompt, though the table has 32 positions.
    answered = []
    for prompt in ("a long prompt:", "pt:"):
        arguments = ("--config", config, "--checkpoint", "start", "data.row_length=8", "--prompt", prompt)
        assert run(generate, *arguments) == 0
        answered.append(json.loads(capsys.readouterr().out)["answer"])
    assert answered[0] == answered[1]


@pytest.fixture
def native(config: Path, tmp_path: Path) -> Path:
    """A native checkpoint of the weights that `start` means."""
    loaded = load_config(config)
    layout = start_distributed(loaded)
    try:
        engine = build_engine(loaded, layout)
        initialise(engine.chunks, loaded.model, loaded.training.seed, layout)
        engine.optimizer.reload_model_params()
        tokenizer = Tokenizer.load(Path(loaded.evaluation.tokenizer or ""))
        state = RunState(7, 0, "plan", "corpus", tokenizer.sha256)
        store = CheckpointStore(tmp_path / "checkpoints", CheckpointConfig(asynchronous=False))
        store.save(engine, state, {})
        return tmp_path / "checkpoints" / "iter_0000007"
    finally:
        stop_distributed()


def test_native_checkpoint_scores_like_the_weights_in_it(
    config: Path, tmp_path: Path, native: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(evaluate, "--config", config, "--checkpoint", "start") == 0
    assert run(evaluate, "--config", config, "--checkpoint", native) == 0
    start, loaded = (
        tmp_path / "run" / "evaluation" / "start",
        tmp_path / "run" / "evaluation" / "iter_0000007",
    )
    assert candidate_scores(loaded) == candidate_scores(start)
    assert answers(loaded) == answers(start)
    fingerprints = {report_of(folder)["conditions"]["checkpoint_fingerprint"] for folder in (start, loaded)}
    assert len(fingerprints) == 2

    # The prefix is the checkpoint's own.
    capsys.readouterr()
    arguments = ("--config", config, "--checkpoint", native, "model.inference_prefix=eos")
    assert run(evaluate, *arguments) == 2
    assert capsys.readouterr().err.startswith("error: model.inference_prefix: got eos; allowed: none")

    # And so is its tokenizer: one of the same size with two ids exchanged is another.
    other = tmp_path / "other-tokenizer"
    shutil.copytree(load_config(config).evaluation.tokenizer or "", other)
    vocabulary = json.loads((other / "vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    for command in ((evaluate,), (generate, "--prompt", "0:")):
        arguments = ("--config", config, "--checkpoint", native, f"evaluation.tokenizer={other}")
        assert run(command[0], *command[1:], *arguments) == 2
        assert "error: evaluation.tokenizer: got" in capsys.readouterr().err


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    folder, config = tmp_path / "weights", Config()
    folder.mkdir()
    (folder / "a.bin").write_bytes(bytes(5 << 20))
    first = fingerprint_weights(config, folder)
    assert fingerprint_weights(config, folder) == first
    for place in (0, (5 << 20) // 2, (5 << 20) - 1):
        content = bytearray(5 << 20)
        content[place] = 1
        (folder / "a.bin").write_bytes(content)
        assert fingerprint_weights(config, folder) != first
    (folder / "a.bin").write_bytes(bytes(5 << 20))
    (folder / "a.bin").rename(folder / "b.bin")
    assert fingerprint_weights(config, folder) != first
    # metaseq's weights may be one file.
    files = [tmp_path / "first.pt", tmp_path / "second.pt"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    assert fingerprint_weights(config, files[0]) != fingerprint_weights(config, files[1])
    other_seed = Config(training=TrainingConfig(seed=1))
    assert fingerprint_weights(config, None) != fingerprint_weights(other_seed, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.bench=absent"], "error: no bench in absent: manifest.json is missing"),
        (["evaluation.bench=null"], "error: evaluation.bench: got none; allowed: a folder"),
        (["evaluation.tokenizer=absent"], "error: absent holds no tokenizer"),
        (["evaluation.tokenizer=null"], "error: evaluation.tokenizer: got none; allowed: a folder"),
        (["model.vocab_size=256"], "error: model.vocab_size: got 256; allowed: at least the tokenizer's 260"),
        (["model.attention_backend=flash"], "error: model.attention_backend: got flash; allowed: triton or"),
        (["parallel.pipeline_model_parallel_size=2"], "error: parallel.pipeline_model_parallel_size: got 2"),
        (["parallel.tensor_model_parallel_size=4"], "error: world size: got 1; allowed: a multiple of"),
        (["model.initialisation=null"], "error: --checkpoint start: got neither"),
        (["--checkpoint", "absent"], "error: absent: no such folder; complete checkpoints beside it"),
        (["--baseline", "absent"], "error: no absent/report.json: a baseline is"),
    ],
)
def test_mistakes_are_said_in_one_line(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(evaluate, "--config", config, "--checkpoint", "start", *arguments) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_help_imports_nothing_heavy(module: str) -> None:
    program = (
        f"import sys\nfrom megatron_iml.{module} import parse_arguments\n"
        "try: parse_arguments(['--help'])\n"
        "except SystemExit: print(*{'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []
    assert "--checkpoint" in done.stdout
