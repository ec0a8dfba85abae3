"""Every format to native and back, bit for bit; inputs are written and outputs read without our code."""

from pathlib import Path

import converter
import foreign_checkpoints as foreign
import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors")


def command(form: str, source: Path, output: Path, *options: str) -> None:
    assert converter.run(form, source, output, *options) == 0


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("shape", "dtype", "variant"),
    [
        ((2, 32, 4), torch.float16, {"safetensors": True}),
        ((1, 16, 1), torch.bfloat16, {"safetensors": True, "shards": 3, "head": True}),
        ((3, 48, 3), torch.float32, {"safetensors": True, "prefix": ""}),
        ((2, 32, 4), torch.float16, {"safetensors": False, "head": True}),
        ((5, 24, 2), torch.bfloat16, {"safetensors": False, "shards": 2, "prefix": ""}),
    ],
)
def test_hugging_face_to_native_and_back(tmp_path, shape, dtype, variant) -> None:
    layers, hidden, heads = shape
    state = foreign.random_opt(layers, hidden, dtype=dtype)
    foreign.write_hugging_face(tmp_path / "in", state, heads=heads, **variant)
    command("native", tmp_path / "in", tmp_path / "native", "--inference-prefix", "eos", "--verify")
    container = "safetensors" if variant["safetensors"] else "bin"
    options = ("--container", container, "--max-shard-bytes", "5000", "--verify")
    command("hugging-face", tmp_path / "native", tmp_path / "out", *options)
    assert len(list((tmp_path / "out").glob(f"*.{container}"))) > 1
    assert_same(foreign.read_hugging_face(tmp_path / "out"), state)


@pytest.mark.parametrize(
    ("parts", "shards", "configuration"),
    [
        (1, None, "argparse"),
        (2, None, "omegaconf"),
        (1, 3, "omegaconf"),
        (2, 5, "argparse"),
        (4, 7, "omegaconf"),
    ],
)
def test_metaseq_to_native_and_back(tmp_path, parts, shards, configuration) -> None:
    state = foreign.random_opt()
    foreign.write_metaseq(tmp_path / "in", state, parts, shards, configuration=configuration)
    command("native", tmp_path / "in", tmp_path / "native", "--inference-prefix", "none", "--verify")
    # By way of Hugging Face's names, whose tensors the independent writer began with.
    command("hugging-face", tmp_path / "native", tmp_path / "hf", "--verify")
    assert_same(foreign.read_hugging_face(tmp_path / "hf"), state)
    options = ["--parts", str(parts), *([] if shards is None else ["--shards", str(shards)])]
    command("metaseq", tmp_path / "native", tmp_path / "out", *options, "--verify")
    for part in range(parts):
        own = foreign.metaseq_part(state, part, parts)
        if shards is None:
            name = "reshard.pt" if parts == 1 else f"reshard-model_part-{part}.pt"
            assert_same(foreign.read_metaseq(tmp_path / "out" / name)["model"], own)
            continue
        for shard, expected in enumerate(foreign.flatten(own, shards)):
            saved = foreign.read_metaseq(
                tmp_path / "out" / f"checkpoint_last-model_part-{part}-shard{shard}.pt"
            )
            assert_same(saved["model"], expected["model"])
            ours, theirs = (one["shard_metadata"]["param_metadata"] for one in (saved, expected))
            for mine, other in zip(ours, theirs, strict=True):
                assert mine["fsdp_path"] == other["fsdp_path"]
                flat = mine["params"]["flat_param_0"]
                wanted = other["params"]["flat_param_0"]
                assert list(flat) == ["names", "shapes", "numels", "padding"]
                assert flat == {**wanted, "shapes": [tuple(shape) for shape in wanted["shapes"]]}


def test_other_numbers_of_parts_and_shards(tmp_path) -> None:
    state = foreign.random_opt()
    foreign.write_metaseq(tmp_path / "in", state, 4, 3)
    command("metaseq", tmp_path / "in", tmp_path / "two", "--parts", "2", "--verify")
    for part in range(2):
        saved = foreign.read_metaseq(tmp_path / "two" / f"reshard-model_part-{part}.pt")
        assert_same(saved["model"], foreign.metaseq_part(state, part, 2))
    command("metaseq", tmp_path / "two", tmp_path / "one", "--verify")
    saved = foreign.read_metaseq(tmp_path / "one" / "reshard.pt")
    assert_same(saved["model"], foreign.metaseq_part(state, 0, 1))
