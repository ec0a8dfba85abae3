"""Show what a native checkpoint holds, or which checkpoints a folder has; --verify reads every byte of them.

Examples: python tools/checkpoint/show.py run/checkpoints
          python tools/checkpoint/show.py run/checkpoints/iter_0004000 --verify --tensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_iml.command import command_parser, run_command

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_iml.checkpoint.record import Record


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="iter_XXXXXXX, or the folder of a run's checkpoints")
    parser.add_argument("--verify", action="store_true", help="compare every file with its size and SHA-256")
    parser.add_argument("--tensors", action="store_true", help="list every tensor (imports torch)")
    return parser.parse_args(arguments)


def show(arguments: argparse.Namespace) -> None:
    """Print one checkpoint or a table of several."""
    from rich.console import Console

    from megatron_iml.checkpoint.record import MARKER, check_files, complete_checkpoints, read_record

    folder: Path = arguments.folder
    # A log file gets whole lines at any width.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    # By its record, not by its name: a checkpoint may have been copied to any.
    single = (folder / MARKER).is_file()
    folders = [folder] if single else complete_checkpoints(folder)
    if not folders:
        # Says what is beside it, or that there is nothing.
        read_record(folder)
    # All before the first line: a damaged one is an error by itself, not the end of a table.
    records = {path: read_record(path) for path in folders}
    if single:
        console.print(description(folder, records[folder]))
    else:
        console.print(overview(records))
    for path, record in records.items():
        if arguments.tensors:
            console.print(tensors(path))
        if arguments.verify:
            check_files(path, record.files)
            console.print(f"{path}: {len(record.files)} files, every byte as it was written")


def overview(records: dict[Path, "Record"]) -> "Table":
    """A line for each checkpoint."""
    from rich.table import Table

    table = Table("checkpoint", "step", "rows", "GB", "saved at", "validation loss", box=None)
    for path, record in records.items():
        state = record.state
        losses = ", ".join(f"{level} {loss:.4f}" for level, loss in record.validation.items())
        size = f"{record.total_bytes / 1e9:.3f}"
        table.add_row(path.name, str(state.step), str(state.rows_consumed), size, record.saved_at, losses)
    return table


def description(folder: Path, record: "Record") -> "Table":
    """Everything that the record of one checkpoint says, but for its configuration."""
    from rich.table import Table

    parallel, training = record.config["parallel"], record.config["training"]
    sizes = {name: parallel[f"{name}_model_parallel_size"] for name in ("tensor", "pipeline")}
    # None where the pipeline is not interleaved: a stage is one chunk then.
    chunks = parallel["virtual_pipeline_model_parallel_size"] or 1
    data = record.world_size // (sizes["tensor"] * sizes["pipeline"])
    model = record.config["model"]
    rows = {
        "checkpoint": str(folder),
        "step": str(record.state.step),
        "rows consumed": str(record.state.rows_consumed),
        "model": f"{model['num_layers']} layers x {model['hidden_size']}, vocabulary {model['vocab_size']}",
        "precision": training["precision"],
        "saved by": f"tensor {sizes['tensor']} x pipeline {sizes['pipeline']} x data {data}, {chunks} chunks "
        "a stage; any layout reads it",
        "saved at": record.saved_at,
        "versions": ", ".join(f"{name} {version}" for name, version in record.versions.items()),
        "configuration": f"SHA-256 {record.config_sha256}",
        "corpus": record.state.corpus_fingerprint or "none",
        "plan": record.state.plan_fingerprint or "none",
        **{f"validation, {level}": f"{loss:.6f}" for level, loss in record.validation.items()},
        **{f"file {name}": f"{file.bytes:,} bytes" for name, file in sorted(record.files.items())},
        "in all": f"{record.total_bytes:,} bytes",
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def tensors(folder: Path) -> "Table":
    """Name, type and shape of everything stored, and in how many pieces."""
    from rich.table import Table
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    table = Table("tensor", "type", "shape", "pieces", box=None)
    for name, entry in sorted(FileSystemReader(str(folder)).read_metadata().state_dict_metadata.items()):
        # Beside tensors lie the extra states of linear layers, which are empty.
        if isinstance(entry, TensorStorageMetadata):
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            table.add_row(name, dtype, str(list(entry.size)), str(len(entry.chunks)))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for the user's mistakes, a damaged checkpoint among them."""
    parsed = parse_arguments(arguments)
    return run_command(lambda: show(parsed))


if __name__ == "__main__":
    sys.exit(main())
