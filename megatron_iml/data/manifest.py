"""Reads the manifest of a bench, a corpus or a plan: a folder enters, its manifest leaves, known to be one.

    read_manifest(Path("bench"), "corpus", 1, {"tasks", ...}, "build_corpus.py")
    ->  ValueError: bench/manifest.json: not the manifest of a corpus (no shards, tasks); name the folder ...

All three are called manifest.json, so that naming the folder of another step is an easy slip.
"""

from collections.abc import Set
from pathlib import Path
from typing import Any

from megatron_iml.data.text_files import json_object

MANIFEST = "manifest.json"


def read_manifest(folder: Path, what: str, version: int, keys: Set[str], tool: str) -> dict[str, Any]:
    """The manifest of a `what`, which has at least these keys and was written by tools/preprocess/`tool`.

    Raises FileNotFoundError without a manifest, ValueError for one of another kind or format version.
    """
    path = folder / MANIFEST
    written_by = f"what tools/preprocess/{tool} wrote"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {what} in {folder}: {MANIFEST} is missing; name the folder of {written_by}"
        )
    manifest = json_object(path)
    # Before the version, which says nothing of a manifest of another kind.
    if missing := sorted(keys - set(manifest)):
        raise ValueError(
            f"{path}: not the manifest of a {what} (no {', '.join(missing)}); name the folder of {written_by}"
        )
    if manifest["format_version"] != version:
        raise ValueError(
            f"{path}: got format version {manifest['format_version']}, allowed: {version}; "
            f"build it anew with tools/preprocess/{tool}"
        )
    return manifest
