"""The config of a bench: which folders are read, and what is held out.

What enters: a YAML file. What leaves: checked sources with absolute folders, and the splits.

    sources:
      - {reader: super_natural_instructions, folder: natural-instructions}
      - {reader: reasoning_gym, options: {examples_per_task: 400, seed: 1}}
    splits: splits.yaml

A relative folder is looked up beside the YAML file, or below another root where one is given; `splits`
always beside the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources import Source, read_source
from megatron_iml.data.splits import Splits, load_splits
from megatron_iml.data.text_files import yaml_mapping

ENTRY_TYPES: Mapping[str, type] = {"reader": str, "folder": str, "options": dict}


@dataclass(frozen=True)
class BenchConfig:
    """Sources in the order in which their tasks are written, and the splits."""

    sources: tuple[Source, ...]
    splits: Splits

    def tasks(self, drops: Drops) -> list[Task]:
        """Every task of every source; examples are not read yet."""
        return [task for source in self.sources for task in read_source(source, drops)]


def load_bench_config(path: Path, source_root: Path | None = None) -> BenchConfig:
    """Read a bench config.

    Args:
        path: the YAML file.
        source_root: where relative source folders are looked up instead of beside the file.

    Raises:
        ValueError: unknown keys, readers, options; no sources.
        FileNotFoundError: no such file, splits file or source folder.
    """
    content = yaml_mapping(path)
    if set(content) != {"sources", "splits"} or not isinstance(content["splits"], str):
        raise ValueError(
            f"{path}: got the keys {sorted(content)}, expected a list `sources` and a file name `splits`"
        )
    if not isinstance(content["sources"], list) or not content["sources"]:
        raise ValueError(f"{path}: sources must be a list of at least one reader")
    # Absolute, since a reader may run after the working folder has changed.
    root = (source_root or path.parent).absolute()
    sources = tuple(_source(path, root, entry) for entry in content["sources"])
    return BenchConfig(sources, load_splits(path.parent / content["splits"]))


def _source(path: Path, root: Path, entry: object) -> Source:
    if (
        not isinstance(entry, dict)
        or not {"reader"} <= set(entry) <= set(ENTRY_TYPES)
        or not all(isinstance(value, ENTRY_TYPES[key]) for key, value in entry.items())
    ):
        raise ValueError(f"{path}: a source is {entry!r}; give a reader and, as it needs, folder and options")
    folder = root / entry["folder"] if "folder" in entry else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"{path}: no source folder {folder}; correct it or give --source-root")
    return Source(entry["reader"], folder, entry.get("options", {}))
