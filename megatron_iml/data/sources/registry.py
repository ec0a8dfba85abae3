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
    big_bench_hard,
    crossfit,
    dialogues,
    exmix,
    flan,
    flan_cot,
    grade_school_math,
    instruction_rows,
    mmlu,
    pretraining_text,
    promptsource,
    raft,
    reasoning,
    reasoning_gym,
    recross,
    rendered_pairs,
    source_target,
    super_natural_instructions,
    t5,
    unified_skg,
)

READERS: Mapping[str, Callable[..., Iterator[Task]]] = {
    # Names are part of users' configs: a module may be renamed, its key may not.
    "big_bench_hard": big_bench_hard.read,
    "crossfit": crossfit.read,
    "dialogues": dialogues.read,
    "exmix": exmix.read,
    "flan": flan.read,
    "flan_cot": flan_cot.read,
    "grade_school_math": grade_school_math.read,
    "instruction_rows": instruction_rows.read,
    "mmlu": mmlu.read,
    "pretraining_text": pretraining_text.read,
    "promptsource": promptsource.read,
    "raft": raft.read,
    "reasoning": reasoning.read,
    "reasoning_gym": reasoning_gym.read,
    "recross": recross.read,
    "rendered_pairs": rendered_pairs.read,
    "source_target": source_target.read,
    "super_natural_instructions": super_natural_instructions.read,
    "t5": t5.read,
    "unified_skg": unified_skg.read,
}
# By name and not by a signature: `read(None, ...)` looks like any other reader's.
GENERATORS = frozenset({"reasoning_gym"})
"""Readers that make their examples and so take no folder."""


@dataclass(frozen=True)
class Source:
    """One entry of a bench config, checked."""

    reader: str
    # Resolved by `bench/config.py`; None for a reader that makes its examples.
    folder: Path | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    only_new: bool = False
    """Leave out tasks whose data set another source has, as the paper did for CrossFit, ExMix and T5."""

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            # The nearest, or all twenty: a name unlike any other is no typing error.
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
            # The two positional ones are the folder and the ledger, which the config does not give.
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        for name, value in self.options.items():
            if name not in defaults:
                known = ", ".join(defaults) or "none"
                raise ValueError(f"reader {self.reader} has no option {name!r}; its options: {known}")
            # The defaults say which types are right; a list in YAML is a sequence in Python.
            expected = list if isinstance(defaults[name], tuple) else type(defaults[name])
            # Exactly: isinstance would take `true` for a seed of 1.
            if type(value) is not expected:
                raise ValueError(
                    f"reader {self.reader}: option {name} is {value!r}; give {expected.__name__}"
                )


def read_source(source: Source, drops: Drops) -> Iterator[Task]:
    """The tasks of one source."""
    return READERS[source.reader](source.folder, drops, **source.options)
