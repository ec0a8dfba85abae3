"""safetensors files, read without the library."""

import json
import zlib

import pytest
import torch

from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile, read_safetensors

save_file = pytest.importorskip("safetensors.torch").save_file


def test_what_the_library_wrote(tmp_path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "c": torch.randn(2, 2).bfloat16(),
        "empty": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_safetensors(MappedFile(tmp_path / "x.safetensors"), {})
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].read(), tensor), name


def test_a_known_checksum_is_compared(tmp_path) -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    path = tmp_path / "x.safetensors"
    save_file({"fc1": tensor}, path)
    checksums = {"fc1": zlib.crc32(tensor.numpy().tobytes())}
    assert torch.equal(read_safetensors(MappedFile(path), checksums)["fc1"].read(), tensor)
    content = bytearray(path.read_bytes())
    content[-2001] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor fc1 is damaged"):
        read_safetensors(MappedFile(path), checksums)["fc1"].read()


def test_truncated_and_damaged_files_are_refused_by_name(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64), "b": torch.ones(64)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["b"]["shape"] = [63]
    shorter = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    cases = {
        content[:-1]: f"has {len(content) - 1} bytes, its tensors need {len(content)}: the file is truncated",
        content + b"x": "not what its header says",
        content[:60]: "truncated or no safetensors file",
        b"\xff" * 64: "truncated or no safetensors file",
        content[:8] + b"?" + content[9:]: "damaged header",
        content[:8] + shorter + content[8 + length :]: "tensor b does not lie where its shape",
    }
    for damaged, message in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as caught:
            read_safetensors(MappedFile(path), {})
        assert str(path) in str(caught.value)
