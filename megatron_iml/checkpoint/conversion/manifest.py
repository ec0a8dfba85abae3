"""The manifest of a converted folder: where its weights came from, and a checksum of every tensor.

    conversion.json   {"format_version": 1, "source": {...}, "tensors": {"model.safetensors": {
                          "model.decoder.layers.0.fc1.weight": {"bytes": 134217728, "crc32": "9f1c03aa"}}}}

CRC-32, as in the zip archives of torch: it finds every flipped byte; it is no defence against an attacker.
"""

from pathlib import Path
from typing import Any

from megatron_iml.data.text_files import json_object

MANIFEST = "conversion.json"
FORMAT_VERSION = 1


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a conversion recorded in the folder; None if the folder was not written by one.

    Raises:
        ValueError: if a newer version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = json_object(path)
    # A newer form may mean something else by the same words.
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}: "
            "read it with the version that wrote it"
        )
    return manifest


def read_checksums(folder: Path) -> dict[str, dict[str, int]]:
    """CRC-32 of every tensor of every file that a conversion wrote; nothing for other folders.

    Raises:
        FileNotFoundError: if a file of the manifest is gone.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return {}
    files: dict[str, dict[str, Any]] = manifest["tensors"]
    gone = [name for name in files if not (folder / name).is_file()]
    # Or its tensors would be missed one by one, by names that do not say which file to copy.
    if gone:
        raise FileNotFoundError(
            f"{folder} lacks {gone[0]}, which {MANIFEST} lists ({len(gone)} of {len(files)} files are gone): "
            "copy the folder again"
        )
    return {
        name: {tensor: int(entry["crc32"], 16) for tensor, entry in tensors.items()}
        for name, tensors in files.items()
    }
