"""What a checkpoint says of itself is believed only if it is whole."""

import json
from pathlib import Path

import pytest

from megatron_iml.checkpoint.record import (
    Record,
    RunState,
    StoredFile,
    check_files,
    complete_checkpoints,
    damage,
    describe_file,
    files_of,
    read_record,
    write_record,
)


def write_checkpoint(folder: Path, step: int, validation: dict[str, float] | None = None) -> Path:
    """A complete checkpoint without tensors: two files and a record of them."""
    checkpoint = folder / f"iter_{step:07d}"
    checkpoint.mkdir(parents=True)
    for name in ("weights_00000.distcp", "optimizer_00000.distcp"):
        (checkpoint / name).write_bytes(name.encode() * 100)
    files = {path.name: describe_file(path) for path in checkpoint.iterdir()}
    state = RunState(step, 4 * step, "plan", "corpus")
    record = Record(state, {"model": {"size": "tiny"}}, 1, {"torch": "2"}, validation or {}, "2026", files)
    write_record(checkpoint, record)
    return checkpoint


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 3, {"fully_held_out": 2.5})
    record = read_record(folder)
    assert record.state == RunState(3, 12, "plan", "corpus")
    assert record.validation == {"fully_held_out": 2.5}
    assert record.files["weights_00000.distcp"].bytes == 2000
    assert record.total_bytes == 2000 + 2200
    # Computed with `printf '{"model": {"size": "tiny"}}' | sha256sum`.
    assert record.config_sha256 == "5b9c0ca524bd08e3ddf86a4eebf74c42bd5b5ebe0dc1ba917651270ffbfab95d"


def test_complete_checkpoints_are_those_with_a_name_and_a_record(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "iter_0000030").mkdir()
    write_checkpoint(tmp_path, 40).rename(tmp_path / "iter_0000040.1f.partial")
    write_checkpoint(tmp_path, 50).rename(tmp_path / "iter_0000050.removed")
    names = [folder.name for folder in complete_checkpoints(tmp_path)]
    assert names == ["iter_0000020", "iter_9999999", "iter_10000000"]
    with pytest.raises(FileNotFoundError, match=r"is no complete checkpoint.* in it: \['iter_0000020', "):
        read_record(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"iter_0000030 is no complete checkpoint.*'iter_0000020', "):
        read_record(tmp_path / "iter_0000030")


def test_a_flipped_bit_in_the_record_is_found(tmp_path: Path) -> None:
    marker = write_checkpoint(tmp_path, 3) / "complete.json"
    whole = marker.read_bytes()
    # Between the values lie spaces, and a bit there changes none of them.
    for place in [at for at, byte in enumerate(whole) if not chr(byte).isspace()]:
        flipped = bytearray(whole)
        flipped[place] ^= 1
        marker.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"complete.json is damaged|has checkpoint format"):
            read_record(marker.parent)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "{}", ""])
def test_a_record_that_is_none_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "complete.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged: go on from another checkpoint"):
        read_record(tmp_path)


def test_another_formats_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text(json.dumps({"format_version": 1, "state": {}}))
    with pytest.raises(ValueError, match="has checkpoint format 1, this version reads 2"):
        read_record(tmp_path)


def test_damaged_files_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2)
    folder = write_checkpoint(tmp_path, 3)
    files = read_record(folder).files
    assert damage(folder, files) == []
    weights, optimizer = folder / "weights_00000.distcp", folder / "optimizer_00000.distcp"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    files = {**files, "weights_00001.distcp": StoredFile(1, "")}
    with pytest.raises(ValueError) as caught:
        check_files(folder, files)
    message = str(caught.value)
    assert "optimizer_00000.distcp has 2,199 bytes, 2,200 were written" in message
    assert "weights_00000.distcp holds other bytes than were written" in message
    assert "weights_00001.distcp is missing" in message
    assert message.endswith(f"remove {folder}, and the run goes on from iter_0000002")


def test_who_reads_weights_does_not_read_the_optimizer(tmp_path: Path) -> None:
    record = read_record(write_checkpoint(tmp_path, 3))
    assert set(files_of(record, weights_only=True)) == {"weights_00000.distcp"}
    assert files_of(record, weights_only=False) == record.files
