"""The readers: one module for each file format, one name for each in a bench config.

What enters: an entry of a bench config.

    - reader: super_natural_instructions
      folder: natural-instructions
      options: {positive_examples: 2}

What leaves: the tasks of that folder. A reader is a function `read(folder, drops, *, ...) ->
Iterator[Task]` whose keyword-only arguments are its options. It counts every raw instance in `drops` and
raises `ValueError` for files that cannot be read at all. A new format is a new module and a line in
`READERS`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from megatron_iml.data.example import Task
from megatron_iml.data.ledger import Drops
from megatron_iml.data.sources import (
    flan_cot,
    grade_school_math,
    reasoning_gym,
    source_target,
    super_natural_instructions,
)

READERS: Mapping[str, Callable[..., Iterator[Task]]] = {
    "flan_cot": flan_cot.read,
    "grade_school_math": grade_school_math.read,
    "reasoning_gym": reasoning_gym.read,
    "source_target": source_target.read,
    "super_natural_instructions": super_natural_instructions.read,
}
GENERATORS = frozenset({"reasoning_gym"})
"""Readers that make their examples and so take no folder."""


@dataclass(frozen=True)
class Source:
    """One entry of a bench config, checked."""

    reader: str
    folder: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            near = get_close_matches(self.reader, READERS, n=1) or sorted(READERS)
            raise ValueError(f"no reader {self.reader!r}; choose from {', '.join(near)}")
        if (self.folder is None) != (self.reader in GENERATORS):
            raise ValueError(
                f"reader {self.reader} {'needs a' if self.folder is None else 'takes no'} folder"
            )
        # Read from the signature, so that a reader's options are declared once.
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(READERS[self.reader]).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name, value in self.options.items():
            if name not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"reader {self.reader} has no option {name!r}; its options: {known}")
            # The defaults say which types are right; a list in YAML is a sequence in Python.
            expected = list if isinstance(defaults[name], tuple) else type(defaults[name])
            if type(value) is not expected:
                raise ValueError(
                    f"reader {self.reader}: option {name} is {value!r}; give {expected.__name__}"
                )


def read_source(source: Source, drops: Drops) -> Iterator[Task]:
    """The tasks of one source."""
    return READERS[source.reader](source.folder, drops, **source.options)
