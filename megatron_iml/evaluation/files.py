"""Files that are whole or absent, whatever moment a job is killed at.

write_atomically(Path("out/report.json"), b"{}\\n")     out/report.json.partial, then renamed
"""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, force it to disk, rename. The folder must exist; one writer per path."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
