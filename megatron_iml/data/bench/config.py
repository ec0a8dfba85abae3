"""The config of a bench: which folders are read, and what is held out.

What enters: a YAML file. What leaves: checked sources with absolute folders, and the splits.

    sources:
      - {reader: super_natural_instructions, folder: natural-instructions}
      - {reader: reasoning_gym, options: {examples_per_task: 400, seed: 1}}
    splits: splits.yaml
    categories: my_categories.yaml       # optional: labels beside those of taxonomy/categories.yaml

A source marked `only_new: true` gives only the tasks whose data sets no other source has; one marked
`optional: true` whose folder is not there is recorded in the ledger and left out. A relative folder is
looked up beside the YAML file, or below another root where one is given; `splits` always beside the file.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_iml.data.bench.splits import Splits, load_splits
from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources.registry import Source, read_source
from megatron_iml.data.taxonomy.categories import Categories, categorise, load_categories
from megatron_iml.data.text_files import yaml_mapping

ENTRY_TYPES: Mapping[str, type] = {
    "reader": str,
    "folder": str,
    "options": dict,
    "optional": bool,
    "only_new": bool,
}


@dataclass(frozen=True)
class BenchConfig:
    """Sources in the order in which their tasks are written, and the splits."""

    sources: tuple[Source, ...]
    splits: Splits
    categories: Categories
    root: Path
    """What relative source folders, and names in the ledger, are relative to."""
    absent: tuple[Path, ...] = ()
    """Folders of optional sources that are not there."""

    def tasks(self, drops: Drops) -> list[Task]:
        """Every task of every source under its category; examples are not read yet."""
        # In the ledger and not only on the screen: a bench says by itself what it was made without.
        for folder in self.absent:
            drops.skip_file(folder, "optional source, folder not there")
        # All of them first: what an `only_new` source keeps depends on every other, wherever it stands.
        read = [(source, list(read_source(source, drops))) for source in self.sources]
        return categorise(_without_repeats(read, drops), self.categories)

    def inputs_digest(self) -> str:
        """Changes with the sources, their options, the categories, and any file's name, size or date."""
        # Names, sizes and dates, not contents: sources may be many gigabytes, and every start asks for this.
        files = [
            (path.relative_to(self.root.anchor).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
            for source in self.sources
            for folder in _inputs(source)
            # The path itself as well: an option may name a file.
            for path in [folder, *sorted(folder.rglob("*"))]
            if path.is_file()
        ]
        sources = [
            (each.reader, str(each.folder), dict(each.options), each.only_new) for each in self.sources
        ]
        # Sorted: the order of a set differs from process to process.
        categories = (sorted(self.categories.names), sorted(self.categories.labels.items()))
        return hashlib.sha256(repr((sources, categories, files)).encode()).hexdigest()


def _without_repeats(read: Sequence[tuple[Source, Sequence[Task]]], drops: Drops) -> list[Task]:
    """The tasks of all sources but those of an `only_new` source whose data set another one has."""
    seen = {
        name for source, tasks in read if not source.only_new for task in tasks for name in task.data_sources
    }
    kept: list[Task] = []
    for source, tasks in read:
        for task in tasks:
            if source.only_new and not seen.isdisjoint(task.data_sources):
                assert source.folder is not None, f"{task.name} has data sources, and yet no folder"
                # No file, but this is where the ledger keeps what was passed over.
                drops.skip_file(source.folder / task.name, "only_new: another source has its data set")
            else:
                kept.append(task)
        # Of two such sources the first keeps what both have.
        if source.only_new:
            seen |= {name for task in tasks for name in task.data_sources}
    return kept


def _inputs(source: Source) -> list[Path]:
    """The folder of a source, and the files and folders that its options name (templates, instructions)."""
    if source.folder is None:
        return []
    # Any text may be a path; what is none on disk is another kind of option.
    named = [source.folder / value for value in source.options.values() if isinstance(value, str) and value]
    return [source.folder, *(path for path in named if path.exists())]


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
    files = {key: content[key] for key in ("splits", "categories") if key in content}
    if not {"sources", "splits"} <= set(content) <= {"sources", "splits", "categories"} or not all(
        isinstance(name, str) for name in files.values()
    ):
        raise ValueError(
            f"{path}: got the keys {sorted(content)}, expected a list `sources`, a file name `splits` and, "
            "as needed, a file name `categories`"
        )
    if not isinstance(content["sources"], list) or not content["sources"]:
        raise ValueError(f"{path}: sources must be a list of at least one reader")
    # Absolute, since a reader may run after the working folder has changed.
    root = (source_root or path.parent).absolute()
    sources = [_source(path, root, entry) for entry in content["sources"]]
    # A path stands for an optional source that is not there.
    present = tuple(source for source in sources if isinstance(source, Source))
    absent = tuple(source for source in sources if isinstance(source, Path))
    if not present:
        raise FileNotFoundError(f"{path}: no source folder is in {root}; give the right --source-root")
    own = [path.parent / files["categories"]] if "categories" in files else []
    # Beside the YAML file, wherever the sources are: another root is one of sources alone.
    splits = load_splits(path.parent / content["splits"])
    return BenchConfig(present, splits, load_categories(*own), root, absent)


def _source(path: Path, root: Path, entry: object) -> Source | Path:
    """A source, or the folder of an optional one that is not there."""
    if (
        not isinstance(entry, dict)
        or not {"reader"} <= set(entry) <= set(ENTRY_TYPES)
        or not all(isinstance(value, ENTRY_TYPES[key]) for key, value in entry.items())
    ):
        raise ValueError(
            f"{path}: a source is {entry!r}; give a reader and, as it needs, folder, options, "
            "optional and only_new"
        )
    folder = root / entry["folder"] if "folder" in entry else None
    source = Source(entry["reader"], folder, entry.get("options", {}), entry.get("only_new", False))
    if folder is None or folder.is_dir():
        return source
    if entry.get("optional", False):
        return folder
    raise FileNotFoundError(
        f"{path}: no source folder {folder}; correct it, give --source-root, or mark it `optional: true`"
    )
