"""What a native checkpoint says of itself: complete.json, written last, and the folders that have one.

    checkpoints/
      iter_0000100/                          complete: the folder gets this name when everything is in it
        complete.json                        step, rows consumed, resolved config, fingerprints, losses, files
        weights_00000.distcp  ...            weights that rank 0 wrote
        optimizer_00000.distcp  ...          fp32 weights and Adam moments that rank 0 wrote
        common.pt  .metadata  metadata.json  megatron-core's own: the rest of the state, and what lies where
      iter_0000200.1f3a.partial/             being written, or left by a run that died
      latest_checkpointed_iteration.txt      "100", for people and other tools; nothing here reads it

No torch here: `tools/checkpoint/show.py` answers at once.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_iml.config import ModelConfig
from megatron_iml.data.files import sha256_of, write_atomically

FORMAT_VERSION = 2
MARKER = "complete.json"
# As Megatron-LM names them: seven digits at least, and step 10,000,000 has eight.
COMPLETE_NAME = re.compile(r"iter_\d{7,}")
# Heads are in no tensor's shape, but the rows of the fused projection are in their order.
SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class RunState:
    """What a run needs besides tensors to go on: everything else is a function of these."""

    step: int
    """Optimizer steps taken."""
    rows_consumed: int
    """Rows of the plan trained on: the loader's whole state."""
    plan_fingerprint: str
    """Empty, as the two below, for weights that no training of ours has touched."""
    corpus_fingerprint: str
    tokenizer_sha256: str = ""
    """Of the tokenizer that the corpus was made with."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint as it was when it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """The content of complete.json."""

    state: RunState
    config: dict[str, Any]
    """The resolved configuration of the run."""
    world_size: int
    """Ranks that wrote; with config.parallel, the layout. Any other may read."""
    versions: dict[str, str]
    """Of the libraries that wrote."""
    validation: dict[str, float]
    """Validation loss per level at this step; empty if none was measured."""
    saved_at: str
    """UTC, ISO 8601."""
    files: dict[str, StoredFile]
    """Every other file of the folder."""

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def has_optimizer(self) -> bool:
        """Whether a run can go on from it; weights alone are a start only."""
        return any(name.startswith("optimizer_") for name in self.files)

    @property
    def config_sha256(self) -> str:
        """Equal for two checkpoints whose configurations are."""
        return _digest(self.config)


def write_record(folder: Path, record: Record) -> None:
    """Mark the folder complete."""
    content = {"format_version": FORMAT_VERSION, **asdict(record)}
    # Over everything else, so that a damaged record is known as such before any of it is believed.
    # Indented: people read it, too.
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
    write_atomically(folder / MARKER, text.encode())


def read_record(folder: Path) -> Record:
    """What complete.json says.

    Raises:
        FileNotFoundError: if the checkpoint is not there or not complete.
        ValueError: if it is of another format version, or the record is damaged.
    """
    marker = folder / MARKER
    if not marker.is_file():
        beside = [path.name for path in complete_checkpoints(folder.parent)]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; complete checkpoints beside it: {beside or 'none'}"
            )
        inside = [path.name for path in complete_checkpoints(folder)]
        others = (
            f"name one of those in it: {inside}" if inside else f"complete ones beside it: {beside or 'none'}"
        )
        raise FileNotFoundError(
            f"{folder} is no complete checkpoint: it has no {MARKER}, which is written last; {others}"
        )
    # Whatever is wrong with the text, the remedy is the same.
    damaged = ValueError(f"{marker} is damaged: go on from another checkpoint, or copy this one again")
    try:
        content = json.loads(marker.read_bytes())
        # Format 1 had no digest: such a record is refused by its version below, not called damaged.
        version, digest = content.pop("format_version"), content.pop("sha256", None)
    # The last two: JSON, but no object.
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise damaged from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {version}, this version reads {FORMAT_VERSION}: "
            "convert it with the version that wrote it"
        )
    # After the version: another one may have hashed something else.
    if digest != _digest({"format_version": version, **content}):
        raise damaged
    files = {name: StoredFile(**file) for name, file in content.pop("files").items()}
    return Record(state=RunState(**content.pop("state")), files=files, **content)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    named = [folder for folder in directory.glob("iter_*") if COMPLETE_NAME.fullmatch(folder.name)]
    # By number: as a name iter_10000000 comes before iter_9999999.
    return sorted((folder for folder in named if (folder / MARKER).is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a complete checkpoint's folder."""
    return int(folder.name.removeprefix("iter_"))


def now() -> str:
    """The time, as a record has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe_file(path: Path) -> StoredFile:
    """Size and digest of a file that is there."""
    return StoredFile(path.stat().st_size, sha256_of(path))


def damage(folder: Path, files: Mapping[str, StoredFile]) -> list[str]:
    """What is wrong with these files of a checkpoint, a line each; reads all of those that look whole."""
    problems = []
    # Sizes first: of a truncated file nothing has to be read.
    for name, stored in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != stored.bytes:
            problems.append(f"{name} has {size:,} bytes, {stored.bytes:,} were written")
        elif sha256_of(path) != stored.sha256:
            problems.append(f"{name} holds other bytes than were written")
    return problems


def check_files(folder: Path, files: Mapping[str, StoredFile]) -> None:
    """Refuse a checkpoint with damaged files.

    Raises:
        ValueError: naming each of them, and where to go on from.
    """
    if problems := damage(folder, files):
        others = [path.name for path in complete_checkpoints(folder.parent) if path != folder]
        remedy = f"remove {folder}, and the run goes on from {others[-1]}" if others else "copy it again"
        raise ValueError(
            f"checkpoint {folder} is damaged: {'; '.join(problems)}. Nothing was loaded; {remedy}"
        )


def files_of(record: Record, weights_only: bool) -> dict[str, StoredFile]:
    """The files that a reader needs: all, or all but those of the optimizer."""
    names: Collection[str] = record.files
    return {
        name: record.files[name] for name in names if not (weights_only and name.startswith("optimizer_"))
    }


def check_same_shape(folder: Path, theirs: Mapping[str, Any], ours: ModelConfig) -> None:
    """Refuse a checkpoint of another model size, naming every difference."""
    wrong = [
        f"{name} {vars(ours)[name]} here, {theirs[name]} there"
        for name in SHAPE_FIELDS
        if vars(ours)[name] != theirs[name]
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} is a model of another size: {'; '.join(wrong)}. "
            "Set the model section (or model.size) to the checkpoint's, or name another checkpoint"
        )


def _digest(content: object) -> str:
    # Sorted, so that the order of fields is nobody's business.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
