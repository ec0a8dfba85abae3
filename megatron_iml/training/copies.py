"""Every weight exists, and every copy of a weight is the same bits: checked once, over the whole world.

Replicas hold the same parts; tensor ranks hold the same norms, biases and positions; the first and the last
stage hold the same tied embedding. A rank that was filled from another file, or with another seed, differs
from those it should equal, and a stage that was built too short leaves a weight that nobody holds.

    check_copies(engine)         # RuntimeError: weights: ranks [3] hold other bits than the copies on ...

What it cannot see: a part that only one rank holds (tensor parallel, one replica) has no copy to differ from.
"""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_iml.config import parameter_count
from megatron_iml.model.parameters import named_global_parameters, tensor_parallel_dim

from .engine import Engine

Part = tuple[str, int]
"""Global name, and which tensor-parallel slice of it (0 where it is not cut)."""
Digest = tuple[int, int, int]


def check_copies(engine: Engine) -> None:
    """Raise RuntimeError on every rank, naming ranks and weights, if copies differ or weights are missing."""
    # Digests, not weights: three numbers a tensor.
    everyone: list[dict[Part, Digest]] = [{} for _ in range(engine.layout.world_size)]
    dist.all_gather_object(everyone, _digests(engine))
    holders: dict[Part, dict[int, Digest]] = {}
    for rank, digests in enumerate(everyone):
        for part, digest in digests.items():
            holders.setdefault(part, {})[rank] = digest
    check_equal(holders)
    # One holder of each part: all hold the same, or the line above has raised.
    held = sum(next(iter(digests_by_rank.values()))[0] for digests_by_rank in holders.values())
    expected = parameter_count(engine.config.model)
    if held != expected:
        raise RuntimeError(
            f"weights: all ranks together hold {held:,} parameters, the model has {expected:,}: a stage was "
            "built with too few or too many layers; this is a bug, please report it with the layout"
        )


def check_equal(holders: Mapping[Part, Mapping[int, Digest]]) -> None:
    """Raise RuntimeError if copies differ, naming the ranks that disagree with most others.

    Of two copies either may be wrong; but a rank that is wrong disagrees wherever it shares a weight.
    """
    differing: set[str] = set()
    disagreements: Counter[int] = Counter()
    for (name, _), digests in holders.items():
        counts = Counter(digests.values())
        if len(counts) > 1:
            differing.add(name)
            disagreements.update({rank: len(digests) - counts[own] for rank, own in digests.items()})
    if differing:
        most = max(disagreements.values())
        odd = sorted(rank for rank, count in disagreements.items() if count == most)
        raise RuntimeError(
            f"weights: ranks {odd} hold other bits than the copies on other ranks, in {min(differing)} and "
            f"{len(differing) - 1} more: they were filled from another file, or with another seed"
        )


def _digests(engine: Engine) -> dict[Part, Digest]:
    """Size and digest of every part that this rank holds."""
    digests = {}
    for name, parameter in named_global_parameters(engine.chunks):
        # A tensor that is not cut is the same part on every tensor rank.
        part = 0 if tensor_parallel_dim(parameter) is None else engine.layout.tensor_rank
        digests[name, part] = digest(parameter.detach())
    return digests


def digest(tensor: Tensor) -> Digest:
    """Elements, and weighted sums of their bits by row and by column: a value that moves changes one."""
    # As integers: NaN equals itself then, and -0 is not 0.
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits = bits.view(bits.shape[0], -1)
    # Sums of integers are exact in any order, and the casts inside them need no memory. They may wrap round:
    # equal bits still give equal sums.
    sums = (bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64))
    # From 1: a weight of 0 would hide what the first row or column holds.
    weighted = [(total * torch.arange(1, len(total) + 1, device=total.device)).sum() for total in sums]
    by_column, by_row = torch.stack(weighted).tolist()
    return tensor.numel(), by_column, by_row
