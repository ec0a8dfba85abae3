"""What a conversion records of itself."""

import json
import zlib
from pathlib import Path

import converter
import foreign_checkpoints as foreign
import pytest

from megatron_iml.checkpoint.conversion.manifest import read_checksums, read_manifest

pytest.importorskip("safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    foreign.write_hugging_face(tmp_path / "in", foreign.random_opt())
    output = tmp_path / "out"
    assert converter.run("hugging-face", tmp_path / "in", output, "--max-shard-bytes", "25000") == 0
    return output


def test_it_says_what_came_from_where_and_sums_up_every_tensor(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    source = folder.parent / "in"
    weights = source / "model.safetensors"
    stat = weights.stat()
    assert manifest["source"] == {
        "format": "Hugging Face",
        "path": str(source),
        "files": {str(weights): [stat.st_size, stat.st_mtime_ns]},
    }
    assert manifest["target"]["format"] == "Hugging Face" and manifest["dtype"] is None
    checksums = {name: crc for file in read_checksums(folder).values() for name, crc in file.items()}
    # Computed from what the writer had, not from the file.
    assert checksums == {
        f"model.{name}": zlib.crc32(tensor.numpy().tobytes()) for name, tensor in foreign.random_opt().items()
    }


def test_other_folders_have_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None and read_checksums(tmp_path) == {}


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00003\.safetensors, which conversion"):
        read_checksums(folder)


def test_a_newer_manifest_is_refused(folder: Path) -> None:
    path = folder / "conversion.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
    with pytest.raises(ValueError, match="has format 9, this version reads 1"):
        read_manifest(folder)
