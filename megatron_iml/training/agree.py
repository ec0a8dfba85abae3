"""One voice for a mistake that every rank finds.

A missing file is missed by all ranks; its message should appear once. A file that only one node lacks should
name the rank. So checks run on every rank, the messages are gathered, and all ranks raise the same error:

    loader = on_every_rank(lambda: open_loader(...))
"""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class AgreedMistake(ValueError):
    """A user's mistake that every rank has raised: all may leave together, and one says it."""


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it fails anywhere with a user's mistake, raise AgreedMistake everywhere.

    `action` must hold no collective: a rank that fails before it would leave the others waiting in it.
    """
    result, message = None, None
    try:
        result = action()
    # Anything else is a bug, and keeps its traceback on the rank that has it; the launcher ends the others.
    except (ValueError, OSError) as error:
        # An error without words must still count as one.
        message = str(error) or repr(error)
    failure = agreed_failure(message)
    if failure is not None:
        raise AgreedMistake(failure)
    return result  # type: ignore[return-value]


def agreed_failure(message: str | None) -> str | None:
    """What went wrong on any rank, the same text on all; None if nothing did anywhere. A collective."""
    # Also when all is well: the ranks cannot know that before they have asked.
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    failed = {
        text: [rank for rank, other in enumerate(messages) if other == text] for text in messages if text
    }
    if not failed:
        return None
    everywhere = len(next(iter(failed.values()))) == len(messages)
    return "\n".join(text if everywhere else f"rank {ranks[0]}: {text}" for text, ranks in failed.items())


def disagreement(values: Mapping[int, Hashable]) -> str | None:
    """Who differs, in words, of ranks that should all have one value; None if they do.

    {0: "a", 1: "a", 2: "b"}   ->   "ranks [2] differ from ranks [0, 1]"       the fewest are the odd ones
    """
    holders: dict[Hashable, list[int]] = {}
    for rank, value in values.items():
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return None
    # Of groups of one size, who comes later is called the odd one.
    *odd, common = sorted(holders.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    return f"ranks {sorted(rank for ranks in odd for rank in ranks)} differ from ranks {common}"
