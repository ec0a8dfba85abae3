"""Writes a native checkpoint anew in another precision, or its weights alone; offline, a chunk at a time.

    rewrite(Path("run/checkpoints/iter_0004000"), Path("fp32/iter_0004000"), "fp32", weights_only=False)

What enters: a complete checkpoint. What leaves: another one that appears whole under its name. The layout
needs no rewriting: tensors are stored whole, as chunks that any layout reads. What a precision changes is the
weights: they are rounded from the fp32 master weights where those are there, not from weights that were
rounded before. Master weights and moments are fp32 always and are copied as they lie.
"""

import io
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_iml.data.files import HashingFile, force_to_disk
from megatron_iml.model.transformer_config import PRECISIONS
from megatron_iml.training.optimizer import STATE_PREFIX

from .record import Record, StoredFile, check_files, describe_file, files_of, now, read_record, write_record
from .retention import PARTIAL
from .sharded import MASTER_PREFIX
from .versions import versions


def rewrite(
    source: Path,
    output: Path,
    precision: str | None,
    weights_only: bool,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Record:
    """Write `output` from `source` and return its record.

    Args:
        source: a complete checkpoint.
        output: a folder that does not exist yet.
        precision: fp32, bf16 or fp16; None keeps the one it has.
        weights_only: leave the optimizer out: a start for other runs, not a state to go on from.
        advance: hears the bytes of every chunk, read or left out.

    Raises:
        FileNotFoundError: if the source is no complete checkpoint.
        ValueError: if it is damaged, or the output exists.
    """
    record = read_record(source)
    if output.exists():
        raise ValueError(f"{output} exists, and nothing is overwritten: name another --output, or remove it")
    # The precision it has needs no rounding: its weights are what its master weights were rounded to.
    changed = precision not in (None, record.config["training"]["precision"])
    from_masters = changed and record.has_optimizer
    # Before an hour's work, and of all that is read: rewriting would give damage a good checksum.
    check_files(source, files_of(record, weights_only and not from_masters))
    staging = output.with_name(output.name + PARTIAL)
    # What a killed try has left: it is quicker to write again than to trust.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    dtype = PRECISIONS[precision] if precision is not None and changed else None
    files = _write_chunks(source, staging, dtype, from_masters, weights_only, advance)
    _write_common(source, staging, weights_only)
    for path in staging.iterdir():
        if path.name not in files:
            force_to_disk(path)
            files[path.name] = describe_file(path)
    # A copy: `record` goes on describing the source.
    config = dict(record.config)
    if precision is not None:
        config["training"] = config["training"] | {"precision": precision}
    written = replace(record, config=config, files=files, versions=versions(), saved_at=now())
    write_record(staging, written)
    # Entries before the rename, the rename before anybody is told.
    force_to_disk(staging)
    staging.rename(output)
    force_to_disk(output.parent)
    return written


def _write_chunks(
    source: Path,
    staging: Path,
    dtype: torch.dtype | None,
    from_masters: bool,
    weights_only: bool,
    advance: Callable[[int], None],
) -> dict[str, StoredFile]:
    """All tensors and objects, and `.metadata`, which says where they are; returns the files' digests."""
    old = FileSystemReader(str(source)).read_metadata()
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    files: dict[str, HashingFile] = {}
    for index, place in _in_order(old):
        # What is left out too: a progress bar counts what the source holds.
        advance(place.length)
        # Neither wanted nor rounded from: it need not even be there.
        if weights_only and not from_masters and index.fqn.startswith(STATE_PREFIX):
            continue
        raw = _read(source, place)
        entry = old.state_dict_metadata[index.fqn]
        for name, archive in _rewritten(index.fqn, entry, raw, dtype, from_masters):
            is_state = name.startswith(STATE_PREFIX)
            if is_state and weights_only:
                continue
            # One process, so one file of each kind, whoever wrote the source.
            file_name = f"{'optimizer' if is_state else 'weights'}_00000.distcp"
            # setdefault alone would open, and so empty, the file for every chunk.
            file = files.get(file_name) or files.setdefault(file_name, HashingFile(staging / file_name))
            # A weight made from a master lies where that one lay: only the name changes.
            places[replace(index, fqn=name)] = _StorageInfo(file_name, file.tell(), len(archive))
            file.write(archive)
            entries[name] = _entry(entry, name, dtype)
    metadata = Metadata(entries, storage_data=places, storage_meta=old.storage_meta, version=old.version)
    # As torch's own writer does; its reader unpickles the whole of it.
    (staging / ".metadata").write_bytes(pickle.dumps(metadata))
    sizes = {name: file.tell() for name, file in files.items()}
    return {name: StoredFile(sizes[name], file.close()) for name, file in files.items()}


def _in_order(metadata: Metadata) -> list[tuple[MetadataIndex, _StorageInfo]]:
    """Every stored chunk, by files and places in them, so that disks read on."""
    return sorted(metadata.storage_data.items(), key=lambda one: (one[1].relative_path, one[1].offset))


def _read(source: Path, place: _StorageInfo) -> bytes:
    with (source / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


def _rewritten(
    name: str, entry: Any, raw: bytes, dtype: torch.dtype | None, from_masters: bool
) -> Iterator[tuple[str, bytes]]:
    """What a chunk becomes: itself, or rounded; a master weight gives a weight, in place of the old one."""
    # Beside tensors lie objects, an empty extra state of each linear layer: nothing to round.
    is_weight = isinstance(entry, TensorStorageMetadata) and not name.startswith(STATE_PREFIX)
    rounds = name.startswith(MASTER_PREFIX) if from_masters else is_weight
    if not is_weight or dtype is None:
        # As it lies: an archive of its own, whose bytes do not depend on where they are.
        yield name, raw
    if rounds and dtype is not None:
        rounded = io.BytesIO()
        torch.save(torch.load(io.BytesIO(raw), weights_only=True).to(dtype), rounded)
        yield name.removeprefix(MASTER_PREFIX), rounded.getvalue()


def _entry(old: Any, name: str, dtype: torch.dtype | None) -> Any:
    """How `.metadata` describes it: chunks and shape as they were, the type as it is now."""
    if dtype is None or name.startswith(STATE_PREFIX) or not isinstance(old, TensorStorageMetadata):
        return old
    return replace(old, properties=replace(old.properties, dtype=dtype))


def _write_common(source: Path, staging: Path, weights_only: bool) -> None:
    """megatron-core's own small files; the optimizer's step counts lie in common.pt."""
    shutil.copyfile(source / "metadata.json", staging / "metadata.json")
    common = torch.load(source / "common.pt", weights_only=True)
    # Step counts and loss scale belong to moments that are not there.
    if weights_only:
        common.pop("optimizer", None)
    torch.save(common, staging / "common.pt")
