"""Examples shared out over data-parallel replicas of the model, and put together again.

    shard("abcde", rank=0, size=2) -> "ace"     shard("abcde", rank=1, size=2) -> "bd"
    merge(["ace", "bd"])           -> ["a", "b", "c", "d", "e"]

Neighbours of a bench file are alike in length, so dealing them out in turn balances the work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


def _gather_alone(mine: Any) -> list[Any]:
    return [mine]


def _broadcast_alone(mine: Any) -> Any:
    return mine


@dataclass(frozen=True)
class Replicas:
    """This process among the replicas.

    `gather` returns every replica's argument, in order of rank, on every replica. `writes` is true for
    exactly one process of the job, and `broadcast` returns that one's argument on every process. The
    default is a job of one process.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = _gather_alone
    broadcast: Callable[[Any], Any] = _broadcast_alone
    writes: bool = True


def shard(items: Sequence[Item], rank: int, size: int) -> Sequence[Item]:
    """The items of one replica: `rank`, `rank + size`, ..."""
    assert 0 <= rank < size, f"rank {rank} is not in a world of {size}"
    # Blocks would do for the sum of the work, not for its end: the long ones lie together.
    return items[rank::size]


def merge(shards: Sequence[Sequence[Item]]) -> list[Item]:
    """The items in their first order, from the shards in order of rank."""
    size, total = len(shards), sum(map(len, shards))
    lengths = [len(part) for part in shards]
    expected = [len(range(rank, total, size)) for rank in range(size)]
    # A replica that lost an example would shift all answers behind it to other questions.
    assert lengths == expected, f"{total} items over {size} ranks make shards of {expected}, got {lengths}"
    return [shards[index % size][index // size] for index in range(total)]
