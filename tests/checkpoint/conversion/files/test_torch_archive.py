"""Pickles from elsewhere: tensors and inert stubs come out, nothing runs, damage is named."""

import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import foreign_checkpoints as foreign
import pytest
import torch

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile, StoredTensor
from megatron_iml.checkpoint.conversion.files.torch_archive import Stub, named, read_archive


class Calls:
    """Pickles as a call of `function`, as malicious files do."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, pickle.loads, os.remove, getattr, print])
def test_a_pickle_that_calls_anything_is_refused_and_not_run(tmp_path, function, capsys) -> None:
    witness = tmp_path / "witness"
    arguments = {eval: f"open({str(witness)!r}, 'w')", exec: f"open({str(witness)!r}, 'w')"}
    argument = arguments.get(function, f"touch {witness}")
    torch.save({"model": {"a": torch.ones(2)}, "cfg": Calls(function, argument)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds a pickle that names \S+, which is neither"):
        read_archive(MappedFile(tmp_path / "evil.pt"))
    assert not witness.exists() and capsys.readouterr().out == ""


def test_a_refused_global_is_refused_wherever_it_hides(tmp_path) -> None:
    """As an argument of an allowed name, or as a tensor's own builder."""
    inner = {"model": {"a": [Calls(dict, Calls(os.system, "true"))]}}
    torch.save(inner, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"names posix\.system"):
        read_archive(MappedFile(tmp_path / "evil.pt"))


def test_foreign_classes_become_stubs_that_hold_their_data(tmp_path) -> None:
    state = foreign.random_opt(layers=1)
    foreign.write_metaseq(tmp_path / "in", state, heads=7)
    saved = read_archive(MappedFile(tmp_path / "in" / "restored.pt"))
    assert type(saved["cfg"]) is Stub
    model = saved["cfg"].state["_content"]["model"].state["_content"]
    assert model["decoder_attention_heads"].state["_val"] == 7
    tensors = named(saved["model"])
    assert tensors["decoder.layers.0.fc1.bias"].name == "decoder.layers.0.fc1.bias"
    assert torch.equal(tensors["decoder.layers.0.fc1.bias"].read(), state["decoder.layers.0.fc1.bias"])


def test_views_parameters_and_every_type(tmp_path) -> None:
    base = torch.arange(24.0)
    saved = {
        "view": base[4:16].view(3, 4).t(),
        "parameter": torch.nn.Parameter(base[:2]),
        "half": base.half(),
        "bf16": base.bfloat16(),
        "long": torch.tensor([3]),
        "empty": torch.empty(0, 5),
    }
    torch.save(saved, tmp_path / "a.pt")
    read = named(read_archive(MappedFile(tmp_path / "a.pt")))
    for name, tensor in saved.items():
        assert isinstance(read[name], StoredTensor)
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].read(), tensor.detach()), name


def test_every_truncation_and_flipped_byte_is_named_or_harmless(tmp_path) -> None:
    expected = {"a": torch.randn(40, generator=torch.Generator().manual_seed(0)), "b": torch.arange(300)}
    torch.save(expected, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    rng = random.Random(0)
    damaged = tmp_path / "damaged.pt"
    for length in (0, 10, 100, len(content) // 2, len(content) - 1):
        damaged.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"damaged\.pt"):
            read_archive(MappedFile(damaged))
    refused = 0
    for place in rng.sample(range(len(content)), 400):
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        damaged.write_bytes(flipped)
        try:
            read = {name: one.read() for name, one in named(read_archive(MappedFile(damaged))).items()}
        except ValueError as error:
            assert "damaged.pt" in str(error)
            refused += 1
            continue
        # Padding, dates and the like.
        assert all(torch.equal(read[name], tensor) for name, tensor in expected.items()), place
    inside = sum(tensor.nbytes for tensor in expected.values()) / len(content)
    assert refused > 400 * inside


class Claims:
    """Pickles as a tensor of another shape and stride over the numbers of `tensor`."""

    def __init__(self, tensor: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        untyped = tensor.untyped_storage()
        storage = torch.storage.TypedStorage(wrap_storage=untyped, dtype=tensor.dtype, _internal=True)
        self.arguments = (storage, 0, shape, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(("shape", "stride"), [((5,), (1,)), ((2, 2), (3, 1)), ((2,), (4,))])
def test_a_tensor_that_reaches_beyond_its_record_is_refused(tmp_path, shape, stride) -> None:
    torch.save({"a": Claims(torch.arange(4.0), shape, stride)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="exceeds its record"):
        read_archive(MappedFile(tmp_path / "a.pt"))


def test_compressed_records_are_refused(tmp_path) -> None:
    """They cannot be mapped; somebody has packed the file anew."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as whole,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="record a/data/0 is compressed"):
        read_archive(MappedFile(tmp_path / "b.pt"))


def test_files_of_other_kinds_are_refused(tmp_path) -> None:
    path: Path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({"model": 1}) * 9)
    with pytest.raises(ValueError, match="not written by torch 1.6 or newer"):
        read_archive(MappedFile(path))
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not written by torch 1.6 or newer"):
        read_archive(MappedFile(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        MappedFile(path)
