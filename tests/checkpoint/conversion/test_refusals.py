"""Inputs that are not a whole OPT are refused by the command, with the tensor and the file in the message."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import converter
import foreign_checkpoints as foreign
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile
from megatron_iml.checkpoint.conversion.files.torch_archive import named, read_archive

pytest.importorskip("safetensors")

FC1 = "decoder.layers.1.fc1.weight"


def refusal(source: Path, capsys: pytest.CaptureFixture[str], form: str = "native", *options: str) -> str:
    output = source.parent / f"out-{source.name}"
    chosen = options or (("--inference-prefix", "none") if form == "native" else ())
    assert converter.run(form, source, output, *chosen) == 2
    assert not output.exists()
    return capsys.readouterr().err


def drop(state: dict) -> None:
    del state[FC1]


def add(state: dict) -> None:
    state["decoder.layers.1.fc3.weight"] = torch.ones(2)


def misshape(state: dict) -> None:
    state[FC1] = state[FC1][:-1].clone()


def poison(state: dict) -> None:
    state[FC1][3, 3] = float("nan")


def never_filled(state: dict) -> None:
    state[FC1].zero_()


STATES: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing": (drop, f"lacks tensor {FC1}: 35 tensors found, an OPT of this size has 36"),
    "extra": (add, "has tensor decoder.layers.1.fc3.weight, which no OPT of this size has"),
    "shape": (misshape, f"tensor {FC1} has shape (127, 32), allowed: (128, 32)"),
    "nan": (
        poison,
        "tensor decoder.layers.1.mlp.linear_fc1.weight holds nan and nan; allowed: finite numbers",
    ),
    "zeros": (never_filled, "every number of tensor decoder.layers.1.mlp.linear_fc1.weight is 0"),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("safetensors", [True, False])
def test_hugging_face_tensors(tmp_path, capsys, case, safetensors) -> None:
    state = foreign.random_opt()
    change, message = STATES[case]
    change(state)
    foreign.write_hugging_face(tmp_path / "in", state, safetensors, shards=2)
    assert message in refusal(tmp_path / "in", capsys)


CONFIGS = {
    "350m": ({"do_layer_norm_before": False, "word_embed_proj_dim": 512}, "is OPT-350m's variant (post-norm"),
    "projection": ({"word_embed_proj_dim": 512}, "is OPT-350m's variant"),
    "another model": ({"model_type": "llama"}, "model_type is 'llama'; allowed: 'opt'"),
    "activation": ({"activation_function": "gelu"}, "activation_function is 'gelu'; allowed: 'relu'"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings is False; allowed: True"),
    "no norm": ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True; allowed: False"),
    "heads": (
        {"num_attention_heads": 5},
        "got 5 attention heads for a width of 32; allowed: a divisor of it",
    ),
    "layers": ({"num_hidden_layers": 3}, "lacks tensors decoder.layers.2.self_attn.q_proj.weight"),
    "vocabulary": (
        {"vocab_size": 56},
        "tensor decoder.embed_tokens.weight has shape (48, 32), allowed: (56, 32)",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hugging_face_configurations(tmp_path, capsys, case) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    changes, message = CONFIGS[case]
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in refusal(tmp_path / "in", capsys)


def test_hugging_face_files(tmp_path, capsys) -> None:
    state = foreign.random_opt()
    folder = tmp_path / "shards"
    foreign.write_hugging_face(folder, state, shards=3)
    second = folder / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    assert f"{second} has {len(content) - 100} bytes, its tensors need {len(content)}" in refusal(
        folder, capsys
    )
    second.unlink()
    assert "lacks model-00002-of-00003.safetensors, which its index names" in refusal(folder, capsys)
    second.write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    assert "its tensors are not those that model.safetensors.index.json lists" in refusal(folder, capsys)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"metadata": {}}')
    assert f"{index} has no weight_map" in refusal(folder, capsys)
    untied = tmp_path / "untied"
    foreign.write_hugging_face(untied, foreign.random_opt(), safetensors=False, head=True)
    saved = torch.load(untied / "pytorch_model.bin")
    saved["lm_head.weight"] = saved["lm_head.weight"] + 1
    torch.save(saved, untied / "pytorch_model.bin")
    assert "tensor lm_head.weight differs from decoder.embed_tokens.weight" in refusal(untied, capsys)


def test_hugging_face_folders_that_are_none(tmp_path, capsys) -> None:
    assert "nowhere: no such file or folder" in refusal(tmp_path / "nowhere", capsys)
    folder = tmp_path / "in"
    foreign.write_hugging_face(folder, foreign.random_opt(), safetensors=False, head=True)
    weights, config = folder / "pytorch_model.bin", folder / "config.json"
    saved = torch.load(weights)
    torch.save([saved], weights)
    assert f"{weights} holds a list; allowed: a state dict" in refusal(folder, capsys)
    torch.save(saved | {"lm_head.weight": saved["lm_head.weight"][1:].clone()}, weights)
    assert "tensor lm_head.weight has shape (47, 32), allowed: (48, 32)" in refusal(folder, capsys)
    weights.write_bytes(b"short")
    assert f"{weights} has 5 bytes: it is no weight file" in refusal(folder, capsys)
    weights.unlink()
    assert f"{folder} has neither model.safetensors nor pytorch_model.bin" in refusal(folder, capsys)
    config.write_text(json.dumps({"model_type": "opt", "hidden_size": 32}))
    assert f"{config} lacks num_hidden_layers, num_attention_heads, ffn_dim" in refusal(folder, capsys)


def test_metaseq_tensors(tmp_path, capsys) -> None:
    state = foreign.random_opt()
    own = foreign.metaseq_part(state, 0, 1)
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "lost norm": (
            {name: one for name, one in own.items() if "decoder.layer_norm" not in name},
            "lacks tensors decoder.layer_norm.weight, decoder.layer_norm.bias",
        ),
        "old version": (
            own | {"decoder.version": torch.tensor([1.0])},
            "tensor decoder.version is 1; allowed: 3",
        ),
        "350m": (own | {"decoder.project_in_dim.weight": torch.ones(2)}, "is OPT-350m's variant"),
        "untied": (
            own | {"decoder.output_projection.weight": own["decoder.embed_tokens.weight"] + 1},
            "tensor decoder.output_projection.weight differs from decoder.embed_tokens.weight",
        ),
        # What a broken script of metaseq's left where 13 GB should have been.
        "nearly nothing": ({"decoder.version": own["decoder.version"]}, "it is no whole OPT"),
    }
    for name, (model, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        foreign.save_as_metaseq(folder / "reshard.pt", {"model": model}, foreign.HEADS, "omegaconf")
        assert message in refusal(folder, capsys), name


def test_metaseq_files(tmp_path, capsys) -> None:
    state = foreign.random_opt()
    parts = tmp_path / "parts"
    foreign.write_metaseq(parts, state, parts=2)
    # One of two parts, named by itself, is no model.
    first = parts / "checkpoint_1_4000.pt-model_part-0.pt"
    assert "has shape (48, 32), allowed: (96, 32)" in refusal(first, capsys)
    second = parts / "checkpoint_1_4000.pt-model_part-1.pt"
    drifted = foreign.metaseq_part(state, 1, 2)
    drifted["decoder.layers.0.fc2.bias"][0] = 9.0
    torch.save({"model": drifted}, second)
    message = refusal(parts, capsys)
    assert "tensor decoder.layers.0.fc2.bias of part 1 differs from part 0's by up to" in message
    second.write_bytes(second.read_bytes()[:5000])
    assert f"{second} is truncated, damaged or not written by torch" in refusal(parts, capsys)
    second.rename(parts / "checkpoint_1_4000.pt-model_part-2.pt")
    assert "lacks the file of part 1, shard 0" in refusal(parts, capsys)
    second.with_name("other.pt").write_bytes(b"x" * 20)
    assert "holds 2 checkpoints (checkpoint_1_4000.pt, other)" in refusal(parts, capsys)
    shards = tmp_path / "shards"
    foreign.write_metaseq(shards, state, parts=1, shards=4)
    (shards / "checkpoint_last-model_part-0-shard3.pt").unlink()
    assert "the shards of tensor flat_param_0 hold" in refusal(shards, capsys)
    (shards / "checkpoint_last-model_part-0-shard1.pt").unlink()
    assert "lacks the file of part 0, shard 1" in refusal(shards, capsys)


def test_metaseq_files_that_are_not_of_one_checkpoint(tmp_path, capsys) -> None:
    state = foreign.random_opt()
    parts = tmp_path / "parts"
    foreign.write_metaseq(parts, state, parts=2)
    other = foreign.metaseq_part(state, 1, 2)
    other["decoder.layers.1.fc1.weight"] = other["decoder.layers.1.fc1.weight"].float()
    torch.save({"model": other}, parts / "checkpoint_1_4000.pt-model_part-1.pt")
    message = refusal(parts, capsys)
    assert "the parts of decoder.layers.1.fc1.weight have types [torch.float16, torch.float32]" in message
    torch.save({"weights": other}, parts / "checkpoint_1_4000.pt-model_part-1.pt")
    assert "checkpoint_1_4000.pt-model_part-1.pt holds no `model`" in refusal(parts, capsys)
    shards = tmp_path / "shards"
    foreign.write_metaseq(shards, state, parts=1, shards=2)
    files = sorted(shards.iterdir())
    second = read_without_classes(files[1])
    lacking = {name: one for name, one in second["model"].items() if "layers.1" not in name}
    torch.save({**second, "model": lacking}, files[1])
    assert f"{files[1]} lacks tensor decoder.layers.1.flat_param_0" in refusal(shards, capsys)
    torch.save({"model": second["model"]}, files[1])
    assert f"{files[1]} has no shard_metadata, other shards have" in refusal(shards, capsys)
    torch.save({"model": read_without_classes(files[0])["model"]}, files[0])
    assert f"{files[0]} is one of 2 shards without shard_metadata" in refusal(shards, capsys)


def read_without_classes(file: Path) -> dict:
    """The plain data of a file: its tensors and what is said of them."""
    saved = read_archive(MappedFile(file))
    model = {name: stored.read().clone() for name, stored in named(saved["model"]).items()}
    return {"model": model, "shard_metadata": saved["shard_metadata"]}


def test_heads_must_be_known_and_agree(tmp_path, capsys) -> None:
    state = foreign.random_opt()
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save({"model": foreign.metaseq_part(state, 0, 1)}, folder / "reshard.pt")
    message = refusal(folder, capsys)
    assert "2 layers of width 32 are no published OPT; set --num-attention-heads" in message
    options = ("--inference-prefix", "none", "--num-attention-heads", "4")
    assert converter.run("native", folder, tmp_path / "out", *options) == 0
    foreign.write_metaseq(tmp_path / "told", state, heads=4)
    message = refusal(tmp_path / "told", capsys, "native", "--num-attention-heads", "8")
    assert "are 8 by --num-attention-heads (a run's model.num_attention_heads), 4 by the file's" in message
    message = refusal(folder, capsys, "native", "--num-attention-heads", "5")
    assert "got 5 attention heads for a width of 32" in message


def test_native_files(tmp_path, capsys) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    native = tmp_path / "native"
    assert converter.run("native", tmp_path / "in", native, "--inference-prefix", "none") == 0
    capsys.readouterr()
    file = native / "weights_00002.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-3000])
    assert f"{file} is truncated: it has {len(content) - 3000} bytes" in refusal(
        native, capsys, "hugging-face"
    )
    file.unlink()
    assert "lacks weights_00002.distcp, which its .metadata lists" in refusal(native, capsys, "hugging-face")
    file.write_bytes(content)
    described = (native / ".metadata").read_bytes()
    metadata = pickle.loads(described)
    stored = metadata.state_dict_metadata["decoder.final_layernorm.bias"]
    chunk = stored.chunks.pop()
    (native / ".metadata").write_bytes(pickle.dumps(metadata))
    message = refusal(native, capsys, "hugging-face")
    assert (
        "the chunks of tensor decoder.final_layernorm.bias hold 0 numbers, its shape (32,) needs 32"
        in message
    )
    stored.chunks.append(chunk)
    places = metadata.storage_data
    places[MetadataIndex("decoder.final_layernorm.bias", chunk.offsets)] = places[
        MetadataIndex("embedding.word_embeddings.weight", (0, 0))
    ]
    (native / ".metadata").write_bytes(pickle.dumps(metadata))
    message = refusal(native, capsys, "hugging-face")
    assert "tensor decoder.final_layernorm.bias at (0,) is not the chunk of shape (32,)" in message
    (native / ".metadata").write_bytes(described[:100])
    assert ".metadata is damaged" in refusal(native, capsys, "hugging-face")
    (native / "complete.json").unlink()
    assert "is no complete checkpoint" in refusal(native, capsys, "hugging-face")


@pytest.mark.parametrize("form", ["native", "hugging-face", "metaseq"])
def test_a_flipped_byte_of_ours_is_found_in_every_format(tmp_path, capsys, form) -> None:
    state = foreign.random_opt()
    foreign.write_hugging_face(tmp_path / "in", state)
    options = ("--inference-prefix", "none") if form == "native" else ()
    folder = tmp_path / form
    assert converter.run(form, tmp_path / "in", folder, *options) == 0
    capsys.readouterr()
    rng = random.Random(form)
    manifest = json.loads((folder / "conversion.json").read_text())["tensors"]
    for number in range(8):
        name = rng.choice(sorted(manifest))
        content = (folder / name).read_bytes()
        flipped = bytearray(content)
        # The files are weights but for their first and last few percent.
        flipped[rng.randrange(len(content) // 5, 4 * len(content) // 5)] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(flipped)
        output = tmp_path / f"out-{number}"
        heads = ("--num-attention-heads", "4")
        status = converter.run("hugging-face", folder, output, *heads)
        message = capsys.readouterr().err
        if status == 2:
            assert str(folder / name) in message and "tensor" in message and not output.exists()
        else:
            # Headers of records lie between weights; what is not read cannot hurt.
            ours = foreign.read_hugging_face(output)
            assert all(torch.equal(ours[name], tensor) for name, tensor in state.items())
        (folder / name).write_bytes(content)


def test_options_that_do_not_fit(tmp_path, capsys) -> None:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    source = tmp_path / "in"
    assert "does not say which token prompts begin with" in refusal(
        source, capsys, "native", "--dtype", "fp16"
    )
    message = refusal(source, capsys, "metaseq", "--parts", "3")
    assert "--parts: got 3; allowed: a divisor of the model's 4 attention heads" in message
    assert "--vocab-size: got 0" in refusal(source, capsys, "hugging-face", "--vocab-size", "0")
    message = refusal(source, capsys, "hugging-face", "--inference-prefix", "eos")
    assert "--inference-prefix: got eos without --tokenizer-model" in message
    for option in ("--parts", "--shards"):
        with pytest.raises(SystemExit):
            converter.run("metaseq", source, tmp_path / "out", option, "0")
        assert f"argument {option}: got 0, expected a whole number of 1 or more" in capsys.readouterr().err
    state = foreign.random_opt(dtype=torch.float32)
    state["decoder.layers.0.fc1.bias"][5] = 1e6
    foreign.write_hugging_face(tmp_path / "large", state)
    options = ("--dtype", "fp16", "--inference-prefix", "none")
    message = refusal(tmp_path / "large", capsys, "native", *options)
    assert (
        "tensor decoder.layers.0.mlp.linear_fc1.bias holds up to 1e+06, more than torch.float16 can"
        in message
    )
    foreign.write_hugging_face(tmp_path / "double", foreign.random_opt(dtype=torch.float64))
    message = refusal(tmp_path / "double", capsys)
    assert "tensor embedding.word_embeddings.weight has type torch.float64; allowed: torch.float32" in message
    mixed = foreign.random_opt()
    mixed["decoder.layers.1.final_layer_norm.bias"] = mixed["decoder.layers.1.final_layer_norm.bias"].float()
    foreign.write_hugging_face(tmp_path / "mixed", mixed)
    message = refusal(tmp_path / "mixed", capsys)
    assert "decoder.layers.1.pre_mlp_layernorm.bias has type torch.float32, in other layers it has" in message
    assert "flat parameters hold one type" in refusal(tmp_path / "mixed", capsys, "metaseq", "--shards", "2")
