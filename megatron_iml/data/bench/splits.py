"""Who may be trained on: the three levels of generalisation of OPT-IML.

What enters: a splits file and, per task, one hash for each example. What leaves: the level of a task and
the split of each of its rows.

    held_out_categories: [Cause Effect Classification]   # all their tasks: fully_held_out
    held_out_data_sources: [race]                        # every task made from RACE: partially_supervised
    held_out_tasks: [task002_quoref_*]                   # these too; their category stays in training
    validation_examples_per_task: 20                     # every other task is fully_supervised and
    test_examples_per_task: 50                           # gives these many instances to evaluation
    max_examples_per_task: 100000
    max_examples_of_benchmark: {FLAN: 30000}
    seed: 1

A task of 1,000 examples under this file: 20 validation, 50 test, 930 train; held out: 20, 50 and 930
dropped. A task of 100 examples gives at most a fifth to evaluation, in the proportion 20 : 50: 5
validation, 15 test, 80 train. Choice is by hash of seed, task and instance: it changes neither with the
order of a file nor with its other rows.

A task that shares a data source with a held-out one and is not held out itself has no level: it is neither
trained on nor evaluated, as in the official lists of Super-NaturalInstructions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from megatron_iml.data.text_files import yaml_mapping

Level = Literal["fully_held_out", "partially_supervised", "fully_supervised"]
Split = Literal["train", "validation", "test"]
LEVELS: tuple[Level, ...] = get_args(Level)
SPLITS: tuple[Split, ...] = get_args(Split)

# Codes of `assign` beside the indices of SPLITS, with the reason the ledger gives for them.
DROP_REASONS = {
    -1: "above max_examples_per_task",
    -2: "held-out task, beyond the evaluation counts",
    -3: "same source as a held-out instance",
    -4: "shares a data source with a held-out task",
}
# Evaluation takes at most this share of a task that is trained on: a small task stays a training task.
LARGEST_HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Splits:
    """A splits file. Names are those of the tasks and categories themselves, not of files."""

    held_out_categories: tuple[str, ...] = ()
    held_out_tasks: tuple[str, ...] = ()
    """A name or pattern (`task*_race_*`) holds out the tasks of that name, or parent, in every benchmark."""
    held_out_data_sources: tuple[str, ...] = ()
    """Data sets, in any spelling that `data_sources.py` knows: every task made from one of them."""
    shared_data_sources: tuple[str, ...] = ()
    """Data sources that held-out and training tasks may share, e.g. as they share no more than articles."""
    missing_names: Literal["refuse", "allow"] = "refuse"
    """`allow`: the file may name more than the sources hold, though not only what they do not hold."""
    validation_examples_per_task: int = 100
    test_examples_per_task: int = 100
    max_examples_per_task: int = 100_000
    """The paper's M: a random choice of this many examples of a task is used."""
    max_examples_of_benchmark: Mapping[str, int] = field(default_factory=dict)
    """Another M for the tasks of a benchmark; the paper's is 30,000 for FLAN."""
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("validation_examples_per_task", "test_examples_per_task"):
            if asdict(self)[name] < 0:
                raise ValueError(f"splits: {name} is {asdict(self)[name]}; give 0 or more")
        for name, cap in {
            "max_examples_per_task": self.max_examples_per_task,
            **self.max_examples_of_benchmark,
        }.items():
            if cap < 1:
                raise ValueError(f"splits: {name} is {cap}; give 1 or more")

    def cap(self, benchmark: str) -> int:
        """Most examples of a task of a benchmark."""
        return self.max_examples_of_benchmark.get(benchmark, self.max_examples_per_task)


def load_splits(path: Path) -> Splits:
    """Read a splits file; unknown keys and wrong types are a `ValueError`."""
    content = yaml_mapping(path)
    return Splits(**{key: _checked(path, key, value) for key, value in content.items()})


def _checked(path: Path, key: str, value: object) -> Any:
    defaults = asdict(Splits())
    if key not in defaults:
        raise ValueError(
            f"{path}: unknown key {key!r}; {near(key, [field.name for field in fields(Splits)])}"
        )
    # The type of the default says what a value may be.
    default = defaults[key]
    if isinstance(default, int):
        # `true` is an int to Python.
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r}; give a whole number")
        return value
    if isinstance(default, str):
        if value not in ("refuse", "allow"):
            raise ValueError(f"{path}: {key} is {value!r}; choose from refuse, allow")
        return value
    if isinstance(default, dict):
        if not isinstance(value, dict) or not all(type(cap) is int for cap in value.values()):
            raise ValueError(f"{path}: {key} is {value!r}; give benchmarks with whole numbers")
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{path}: {key} is {value!r}; give a list of names")
    return tuple(value)


def assign(
    splits: Splits, benchmark: str, level: Level | None, instances_N: np.ndarray, sources_N: np.ndarray
) -> np.ndarray:
    """Split of each of a task's N rows.

    Args:
        splits: the splits file.
        benchmark: the task's, for its cap.
        level: of `levels.levels_of`; None drops every row.
        instances_N: uint64, `example.instance_hash` of each row.
        sources_N: uint64, `example.source_hash` of each; a training row equal to a held-out one is dropped.

    Returns:
        int8 [N]: an index into `SPLITS`, or a key of `DROP_REASONS`.
    """
    if level is None:
        return np.full(len(instances_N), -4, np.int8)
    # Ties are prompts of one instance, or repeated ids; the stable sort leaves them in the order of the file.
    order_N = np.argsort(instances_N, kind="stable")[: splits.cap(benchmark)]
    validation, test = _held_out_counts(splits, level, len(order_N))
    # Evaluation takes the lowest hashes, the cap the lowest of all: a larger cap adds training rows and moves
    # none, as long as the task is large enough for its evaluation.
    # Beyond the cap until said otherwise.
    split_N = np.full(len(instances_N), -1, np.int8)
    split_N[order_N] = SPLITS.index("train") if level == "fully_supervised" else -2
    split_N[order_N[:validation]] = SPLITS.index("validation")
    split_N[order_N[validation : validation + test]] = SPLITS.index("test")
    held_out = np.isin(split_N, (SPLITS.index("validation"), SPLITS.index("test")))
    # By instance as well: the last one held out may have prompts left on the other side of the line.
    seen = np.isin(sources_N, sources_N[held_out]) | np.isin(instances_N, instances_N[held_out])
    split_N[(split_N == SPLITS.index("train")) & seen] = -3
    return split_N


def _held_out_counts(splits: Splits, level: Level, examples: int) -> tuple[int, int]:
    """Validation and test instances of a task, scaled down together where the task is too small for both."""
    validation, test = splits.validation_examples_per_task, splits.test_examples_per_task
    # What is not trained on may go to evaluation whole.
    room = examples if level != "fully_supervised" else int(examples * LARGEST_HELD_OUT_SHARE)
    if validation + test <= room:
        return validation, test
    # Whole numbers, rounded to the side of the test set, whose noise is what is reported.
    scaled = room * validation // (validation + test)
    return scaled, room - scaled


def near(name: str, known: Sequence[str]) -> str:
    """`did you mean ...` with the nearest known names, or the first few of them."""
    matches = get_close_matches(name, known, n=3, cutoff=0.5)
    if matches:
        return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    return "known are " + ", ".join(known[:5]) + (" ..." if len(known) > 5 else "")
