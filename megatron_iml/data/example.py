"""The two types every benchmark is read into, and the hashes that stand for an example.

What enters: whatever a reader of `data/sources/` finds in a folder. What leaves: a `Task`, which yields its
`Example`s lazily and always in the same order.

    Example(id="train-0", task="gsm8k_train", benchmark="Reasoning", category="Reasoning",
            source="Answer the following question by reasoning step by step.\\nHow many ...?",
            targets=("48/2 = 24 ... The answer is 72",))

No prompt delimiter is in `source` yet: `bench/prompts.py` samples it when the bench is written.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
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
    instruction: str = ""
    """What `source` begins with where the instruction is the task's and not the instance's: demonstrations
    stand between it and the rest. Empty: they stand before the whole source."""
    instance: str = ""
    """Prompts of one instance share it and so go to one split, as do questions whose sources hold one
    another's answers; empty means the id."""


@dataclass(frozen=True, slots=True)
class Task:
    """One data set of a benchmark. A task belongs to exactly one category."""

    name: str
    benchmark: str
    category: str
    """A reader gives the benchmark's own label; `taxonomy/categories.py` turns it into a category."""
    metric: Metric
    examples: Callable[[], Iterator[Example]]
    """Reads the task's files anew at every call, in the same order."""
    data_sources: tuple[str, ...] = ()
    """Data sets the task was made from, as `data_sources.data_source` spells them."""
    parent: str = ""
    """The task of which this is a part ("mmlu" of its 57 subjects), or which other benchmarks have as well
    ("copa" of super_glue__copa): evaluation averages over parts, then over benchmarks, then over tasks."""
    evaluation_only: bool = False
    """Made to be evaluated on (BBH, MMLU, RAFT): never trained on, whatever the splits file says."""


def instance_hash(seed: int, task: str, instance: str) -> int:
    """64 bits of a hash of an instance: the instances of a task in the order of it are in random order."""
    # NUL between the parts: task "a1" with instance "2" must not meet task "a" with "12".
    digest = blake2b(f"{seed}\0{task}\0{instance}".encode(), digest_size=8, person=b"instance").digest()
    return int.from_bytes(digest, "little")


def source_hash(source: str) -> int:
    """64 bits of a hash of an instance's source, to find equal ones."""
    # Not Python's hash(), which is salted anew in every process.
    return int.from_bytes(blake2b(source.encode(), digest_size=8).digest(), "little")
