"""A run that starts from a Hugging Face OPT folder begins where transformers would."""

from pathlib import Path

import pytest
import torch
from end_to_end.conftest import finish, launch, rows_of, train_command
from torch.nn.functional import cross_entropy

from megatron_iml.data.corpus.folder import Corpus
from megatron_iml.data.plan.folder import Plan

transformers = pytest.importorskip("transformers")

STEP_ROWS = range(4)


def opt_folder(folder: Path) -> torch.nn.Module:
    """A random OPT of the chain's shape, with the vocabulary that its tokenizer has."""
    config = transformers.OPTConfig(
        vocab_size=320,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=128,
        max_position_embeddings=64,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=0.3,
    )
    torch.manual_seed(5)
    model = transformers.OPTForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def loss_of_transformers(model: torch.nn.Module, chain: Path) -> float:
    """Mean loss per target of the first step's documents, each alone in a batch of its own."""
    corpus, plan = Corpus.open(chain / "corpus" / "train"), Plan.open(chain / "plan")
    losses = []
    for row in STEP_ROWS:
        for entry in plan.entries(row):
            tokens, source_length = corpus.tokens(int(entry["document"]), int(entry["reference"]))
            ids = torch.from_numpy(tokens[int(entry["cut"]) :].astype("int64"))
            first = max(source_length - int(entry["cut"]), 1)
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0]
            losses.append(cross_entropy(logits[first - 1 :], ids[first:], reduction="none"))
    return float(torch.cat(losses).mean())


def test_first_loss_is_that_of_transformers(chain: Path, tmp_path: Path) -> None:
    model = opt_folder(tmp_path / "opt")
    command = [*train_command(chain, tmp_path / "run"), f"checkpoint.initial_weights={tmp_path / 'opt'}"]
    command += ["model.initialisation=null", "training.steps=2", "checkpoint.save_interval=0"]
    command += [f"model.{place}_dropout=0" for place in ("hidden", "attention", "embedding")]
    out = finish(launch(2, *command))
    assert f"from {tmp_path / 'opt'}" in out.replace("\n", "")
    first = rows_of(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(loss_of_transformers(model, chain), rel=1e-5)
    evaluate = ("megatron_iml.evaluate", "--config", chain / "train.yaml", "--checkpoint", tmp_path / "opt")
    finish(launch(1, *evaluate, "--output", tmp_path / "report"))
    assert (tmp_path / "report" / "report.json").is_file()
