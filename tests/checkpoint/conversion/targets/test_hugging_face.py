"""Exported folders in transformers: the same text becomes the same ids, and the same ids the same answer."""

import json

import converter
import foreign_checkpoints as foreign
import numpy as np
import pytest
import torch
from helpers import single_rank, tiny_config

from megatron_iml.checkpoint.weights import fill_weights
from megatron_iml.data.corpus.tokenizer import Tokenizer, train_byte_level_bpe
from megatron_iml.model.build import build_model
from megatron_iml.model.inference import InferenceModel

transformers = pytest.importorskip("transformers")

TEXTS = ["Is it raining?\nAnswer:", "  two spaces, 3.14 \u00e9\u4f60", "name the colour of\n\n\nsnow"]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level_bpe(
        [f"{text} is it the colour, or rain {n}?" for n, text in enumerate(TEXTS * 5)], 300, folder
    )
    return folder


@pytest.mark.parametrize("prefix", ["none", "eos"])
def test_transformers_answers_as_the_native_model(tmp_path, tokenizer_folder, prefix) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.vocab_size < tokenizer.padded_vocab_size, "there are padding rows that must not win"
    shape = {"vocab": tokenizer.padded_vocab_size, "positions": 64}
    # In fp32: half precision rounds sums of different orders to different tokens now and then.
    state = foreign.random_opt(dtype=torch.float32, std=0.5, **shape)
    foreign.write_metaseq(tmp_path / "in", state, parts=2)
    places = (tmp_path / "in", tmp_path / "native")
    assert converter.run("native", *places, "--inference-prefix", prefix) == 0
    out = tmp_path / "out"
    assert (
        converter.run("hugging-face", places[1], out, "--tokenizer-model", str(tokenizer_folder), "--verify")
        == 0
    )

    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    before = [tokenizer.eos_id] if prefix == "eos" else []
    prompts = [np.array([*before, *tokenizer.encode(text)]) for text in TEXTS]
    for text, prompt in zip(TEXTS, prompts, strict=True):
        assert theirs(text)["input_ids"] == prompt.tolist(), text

    config = tiny_config(
        num_layers=foreign.LAYERS,
        hidden_size=foreign.HIDDEN,
        num_attention_heads=foreign.HEADS,
        vocab_size=tokenizer.padded_vocab_size,
        max_position_embeddings=64,
        inference_prefix=prefix,
    )
    with single_rank(config) as layout:
        chunks = build_model(config, layout)
        fill_weights(places[1], chunks, config.model, layout)
        native = InferenceModel(chunks[0], layout, tokenizer.vocab_size, max_positions=64)
        cache, tokens_B = native.prefill(prompts, NEW_TOKENS)
        answers = [tokens_B]
        for _ in range(NEW_TOKENS - 1):
            answers.append(native.decode(cache, answers[-1]))
    for prompt, ours in zip(prompts, np.stack(answers, axis=1), strict=True):
        generated = model.generate(torch.from_numpy(prompt)[None], max_new_tokens=NEW_TOKENS)[
            0, len(prompt) :
        ]
        # It stops at </s>; the cache of ours is told to go on.
        assert generated.tolist() == ours[: len(generated)].tolist()
        assert len(generated) == NEW_TOKENS or generated[-1] == tokenizer.eos_id
    assert len({tuple(answer) for answer in np.stack(answers, axis=1).tolist()}) == len(TEXTS)
    # The prefix comes back with the weights.
    assert converter.run("native", out, tmp_path / "again") == 0
    record = json.loads((tmp_path / "again" / "complete.json").read_text())
    assert record["config"]["model"]["inference_prefix"] == prefix


def test_the_prefix_may_be_told_where_the_input_does_not_say_it(tmp_path, tokenizer_folder, capsys) -> None:
    vocab = Tokenizer.load(tokenizer_folder).padded_vocab_size
    foreign.write_metaseq(tmp_path / "in", foreign.random_opt(vocab=vocab))
    places, options = (tmp_path / "in", tmp_path / "out"), ("--tokenizer-model", str(tokenizer_folder))
    assert converter.run("hugging-face", *places, *options) == 2
    assert "does not say which token prompts begin with" in capsys.readouterr().err
    assert converter.run("hugging-face", *places, *options, "--inference-prefix", "eos") == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_shards_are_as_large_as_asked_and_listed(tmp_path) -> None:
    state = foreign.random_opt()
    foreign.write_hugging_face(tmp_path / "in", state)
    assert converter.run("hugging-face", tmp_path / "in", tmp_path / "out", "--max-shard-bytes", "25000") == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert index["weight_map"].keys() == {f"model.{name}" for name in state}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    published = foreign.opt_config(state)
    # Dropout and the spread of random weights are the run's own.
    shared = (config.keys() & published.keys()) - {"dropout", "attention_dropout", "init_std"}
    assert {name: config[name] for name in shared} == {name: published[name] for name in shared}
    assert {"num_hidden_layers", "torch_dtype", "do_layer_norm_before", "eos_token_id"} <= shared


def test_a_tokenizer_with_more_entries_than_rows_is_refused(tmp_path, tokenizer_folder, capsys) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    options = ("--tokenizer-model", str(tokenizer_folder))
    native = ("--inference-prefix", "none")
    assert converter.run("native", tmp_path / "in", tmp_path / "native", *native) == 0
    assert converter.run("hugging-face", tmp_path / "native", tmp_path / "out", *options) == 2
    assert "entries; allowed: at most the model's 48 embedding rows" in capsys.readouterr().err
