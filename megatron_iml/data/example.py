"""The two types every benchmark is read into.

What enters: whatever a reader of `data/sources/` finds in a folder. What leaves: a `Task`, which yields its
`Example`s lazily and always in the same order.

    Example(id="train-0", task="gsm8k_train", benchmark="Reasoning", category="Reasoning",
            source="Answer the following question by reasoning step by step.\\nHow many ...?",
            targets=("48/2 = 24 ... The answer is 72",))

No prompt delimiter is in `source` yet: `data/prompts.py` samples it when the bench is written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["accuracy", "exact_match", "rouge_l"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True, slots=True)
class Example:
    """One instance of a task: instruction and input as `source`, one or more references as `targets`."""

    id: str
    task: str
    benchmark: str
    category: str
    source: str
    """Instruction text and input without a delimiter; empty for pretraining text, which is all target."""
    targets: tuple[str, ...]
    """References; the first is the one a training row shows as `tgt`."""
    candidates: tuple[str, ...] = ()
    """Answer options for rank classification; empty means the answer is generated."""


@dataclass(frozen=True, slots=True)
class Task:
    """One data set of a benchmark. A task belongs to exactly one category."""

    name: str
    benchmark: str
    category: str
    metric: Metric
    examples: Callable[[], Iterator[Example]]
    """Reads the task's files anew at every call, in the same order."""
