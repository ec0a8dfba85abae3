"""The same chain on real benchmarks with OPT's own tokenizer, where their samples lie beside the checkout."""

from pathlib import Path

import pytest
import yaml
from end_to_end.conftest import ROOT, finish, launch, rows_of, tool, train_command

from megatron_iml.data.bench.folder import verify_bench
from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan

DEVSET = ROOT.parent / "shared" / "devset"
TOKENIZER = DEVSET / "tokenizer" / "metaseq-opt"

pytestmark = pytest.mark.skipif(not DEVSET.is_dir(), reason=f"no samples of the benchmarks in {DEVSET}")


def test_real_benchmarks_become_a_falling_loss(tmp_path: Path) -> None:
    real = ROOT / "examples" / "real"
    tool(
        "build_bench",
        "--config",
        real / "bench.yaml",
        "--source-root",
        DEVSET,
        "--output",
        tmp_path / "bench",
    )
    bench = verify_bench(tmp_path / "bench")
    assert len({(file.benchmark, file.task) for file in bench.entries}) >= 130
    corpus, plan = tmp_path / "corpus", tmp_path / "plan"
    tokens = ("--tokenizer-model", TOKENIZER, "--output-prefix", corpus)
    tool("build_corpus", "--input", tmp_path / "bench", "--split", "train", *tokens)
    tool("build_plan", "--input", corpus / "train", "--row-length", 2048, "--rows", 12, "--output", plan)
    ledger = Plan.open(plan).ledger
    assert Corpus.open(corpus / "train").padded_vocab_size == 50272
    assert len(ledger) == len(bench.files("train")), "every training task has its account"

    content = yaml.safe_load((real / "train.yaml").read_text())
    content["model"] |= {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 1}
    content["model"] |= {"kernel_backend": "reference"}
    content["data"] = {"train_corpus": str(corpus / "train"), "train_plan": str(plan), "row_length": 2048}
    content["optimizer"] = {"learning_rate": 0.01, "warmup_steps": 2}
    content["training"] |= {"steps": 12, "global_batch_positions": 2048, "precision": "fp32"}
    content["training"]["validation_interval"] = 0
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content))
    finish(launch(1, *train_command(tmp_path, tmp_path / "run")))
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    # 50,272 entries: an untrained model loses ln 50272 = 10.83 a target.
    assert abs(losses[0] - 10.83) < 0.2
    assert losses[-1] < losses[0] - 1
