"""How a bench comes into being whole or not at all: written beside its place, renamed at the end.

with working_folder(Path("bench")) as folder:                 .bench.partial/{records,bench/train,...}
    ...                                                       files of the bench to folder / "bench"
    put_in_place(folder / "bench", Path("bench"))             .bench.partial is gone, bench stands
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_iml.data.bench.folder import LEDGER
from megatron_iml.data.bench.splits import SPLITS
from megatron_iml.data.jobs import claim
from megatron_iml.data.manifest import MANIFEST


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError where a bench may not be written: over anything else, or over a bench unasked."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    # Both: corpora and plans have a manifest as well.
    if not (output / MANIFEST).is_file() or not (output / LEDGER).is_file():
        raise ValueError(
            f"{output} holds something that is not a bench and is never replaced; give another --output"
        )
    if not overwrite:
        raise ValueError(
            f"{output} holds a bench already; give another --output, or --overwrite to replace it"
        )


def unfinished_folder(output: Path) -> Path:
    """Where the parts of an unfinished bench lie: beside it, so that a rename puts it in place."""
    return output.absolute().parent / f".{output.name}.partial"


@contextmanager
def working_folder(
    output: Path, *, overwrite: bool = False, keep: bool = False, shared: bool = False
) -> Iterator[Path]:
    """The folder of unfinished work with its parts, held against other processes.

    Args:
        output: the bench to be; checked as `check_output` says.
        overwrite: replace a bench.
        keep: what is in the folder stays after a failure, and is there again.
        shared: with other jobs of an array.
    """
    folder = unfinished_folder(output)
    # Before looking: else two could find the place free, and each remove what the other writes.
    with claim(output, shared):
        check_output(output, overwrite)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        for part in ("records", *(f"bench/{split}" for split in SPLITS)):
            (folder / part).mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            # What is kept is taken up by the next run, part by part.
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def put_in_place(staging: Path, output: Path) -> None:
    """Rename a finished bench to its name and remove what was left of the work."""
    # A folder cannot be renamed over a full one: the old bench steps aside, and goes when the new one stands.
    replaced = unfinished_folder(output).with_suffix(".replaced")
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    staging.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(unfinished_folder(output))
