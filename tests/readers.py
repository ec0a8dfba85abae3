"""Runs a reader over hand-written files."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from megatron_iml.data.example import Example, Task
from megatron_iml.data.ledger import Drops, TaskCounts


class Reading:
    """What a reader made of a folder: its tasks by name, their examples, and the ledger."""

    def __init__(self, read: Callable[..., Iterator[Task]], folder: Path, **options: object) -> None:
        self.drops = Drops(folder)
        self.tasks = {task.name: task for task in read(folder, self.drops, **options)}

    def examples(self, name: str) -> list[Example]:
        """Examples of a task, checked to close its ledger and to bear its names."""
        task = self.tasks[name]
        found = list(task.examples())
        counts = self.counts(name)
        assert counts.read == len(found) + counts.dropped.total(), "read examples of a task once"
        for example in found:
            assert (example.task, example.benchmark, example.category) == (
                name,
                task.benchmark,
                task.category,
            )
            assert example.source.startswith(example.instruction)
        assert len({example.id for example in found}) == len(found)
        return found

    def counts(self, name: str) -> TaskCounts:
        """The account of a task."""
        return self.drops.task(self.tasks[name].benchmark, name)


def write_files(folder: Path, files: Mapping[str, object]) -> Path:
    """Write texts and bytes as they are, lists of objects as JSON Lines, other values as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list) and name.endswith(".jsonl"):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder
