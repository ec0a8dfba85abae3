"""Planned files, filled by hand, are files that the libraries read."""

import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_iml.checkpoint.conversion.files.plan import (
    FilePlan,
    TensorSpec,
    safetensors_file,
    side_by_side,
    torch_archive,
)
from megatron_iml.checkpoint.conversion.files.stored_tensor import MappedFile
from megatron_iml.checkpoint.conversion.files.torch_archive import read_archive

TENSORS = {"x": torch.randn(5, 7).half(), "y": torch.arange(11.0), "z": torch.randn(3).bfloat16()}


def fill(path: Path, plan: FilePlan, tensors: dict[str, Tensor]) -> None:
    with path.open("wb") as file:
        file.truncate(plan.size)
        for offset, data in plan.frames:
            file.seek(offset)
            file.write(data)
        for name, tensor in tensors.items():
            data = tensor.view(torch.uint8).numpy().tobytes()
            record = plan.records[name]
            assert len(data) == record.num_bytes
            file.seek(record.offset)
            file.write(data)
            for place in record.crc_offsets:
                file.seek(place)
                file.write(zlib.crc32(data).to_bytes(4, "little"))


def specs() -> dict[str, TensorSpec]:
    return {name: TensorSpec(one.dtype, tuple(one.shape), name) for name, one in TENSORS.items()}


@pytest.mark.parametrize("mmap", [False, True])
def test_an_archive_is_what_torch_saves(tmp_path, mmap) -> None:
    path = tmp_path / "a.pt"
    fill(path, torch_archive({"model": specs(), "cfg": {"layers": 2}}), TENSORS)
    assert zipfile.ZipFile(path).testzip() is None
    loaded = torch.load(path, mmap=mmap, weights_only=True)
    assert loaded["cfg"] == {"layers": 2}
    for name, tensor in TENSORS.items():
        assert loaded["model"][name].dtype == tensor.dtype and torch.equal(loaded["model"][name], tensor), (
            name
        )


def test_archives_side_by_side_are_read_where_they_lie(tmp_path) -> None:
    plans = {name: torch_archive(spec) for name, spec in specs().items()}
    fill(tmp_path / "a.distcp", side_by_side(plans), TENSORS)
    file, start = MappedFile(tmp_path / "a.distcp"), 0
    for name, plan in plans.items():
        assert torch.equal(read_archive(file, start, plan.size).read(), TENSORS[name]), name
        start += plan.size
    assert start == file.size


def test_a_safetensors_file_is_what_the_library_reads(tmp_path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    plan = safetensors_file(specs())
    fill(tmp_path / "a.safetensors", plan, TENSORS)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert plan.records["x"].offset % 64 == 0


def test_records_and_places_beyond_four_gigabytes(tmp_path) -> None:
    """Sparse files: 10 GB of zeros take no room."""
    large = TensorSpec(torch.float16, (5 << 29,), "large")
    last = TENSORS["y"]
    value = {"large": large, "second": TensorSpec(torch.float16, (5 << 29,), "second"), "y": specs()["y"]}
    path = tmp_path / "large.pt"
    fill(path, torch_archive(value), {"y": last})
    infos = {info.filename: info for info in zipfile.ZipFile(path).infolist()}
    assert infos["archive/data/0"].file_size == 5 << 30 and infos["archive/data/2"].header_offset > 10 << 30
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert loaded["large"].shape == (5 << 29,) and torch.equal(loaded["y"], last)
    assert torch.equal(read_archive(MappedFile(path))["y"].read(), last)
