"""From raw instances to a task, for readers whose instances are one prompt each.

What enters: a reader's iterator of (id, `Form`), or (id, reason) for an instance that cannot be used. What
leaves: a `Task` whose ledger closes, for every pair is one instance read.

    ("dev-1", Form("Is it?", ("Yes",), ("Yes", "No")))  ->  an Example
    ("dev-2", "blank question")                         ->  dropped, with that reason
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from megatron_iml.data.example import Example, Metric, Task
from megatron_iml.data.ledger import Drops, TaskCounts


class Form(NamedTuple):
    """What a reader makes of an instance: the last fields of an `Example`, in their order."""

    source: str
    targets: tuple[str, ...]
    candidates: tuple[str, ...] = ()
    instruction: str = ""
    instance: str = ""


Instances = Iterator[tuple[str, Form | str]]


def make_task(
    drops: Drops,
    benchmark: str,
    name: str,
    label: str,
    instances: Callable[[TaskCounts], Instances],
    *,
    metric: Metric = "rouge_l",
    data_sources: tuple[str, ...] = (),
    evaluation_only: bool = False,
) -> Task:
    """A task of the instances that `instances` yields, given the account to count repairs in.

    Its parent is its data set: the name under which evaluation finds it in other benchmarks.
    """
    parent = data_sources[0] if data_sources else ""
    # partial and no closure: tasks are pickled for the processes that write them.
    examples = partial(_examples, benchmark, name, label, instances, drops.task(benchmark, name))
    return Task(name, benchmark, label, metric, examples, data_sources, parent, evaluation_only)


def _examples(
    benchmark: str,
    name: str,
    label: str,
    instances: Callable[[TaskCounts], Instances],
    counts: TaskCounts,
) -> Iterator[Example]:
    # Counted here alone, for every pair: a reader cannot forget one, so the ledger closes.
    for id, form in instances(counts):
        counts.read += 1
        if isinstance(form, str):
            counts.drop(form)
        else:
            # In the order of Form's fields, which is that of Example's last five.
            yield Example(id, name, benchmark, label, *form)
