"""A world of any size in one process: this rank's place in it is real, its peers and its tensors are not.

    with fake_world(config, rank=1023, world_size=1024) as layout:
        chunks = build_model(config, layout)          # the last stage's modules, on meta: shapes, no memory

Collectives return at once and compute nothing, tensors that megatron-core would put on a GPU have shapes
only. So any rank's part of the largest model can be built and counted on a laptop (`training/dry_run.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_iml.config import Config

from .cpu_adapter import cpu_adapter
from .groups import Layout, place_in_grid, stop_distributed

META = torch.device("meta")


class _CudaAnswersAsMeta(TorchFunctionMode):
    """What is asked of a GPU is given without memory. Entered above the CPU adapter, so asked first."""

    def __enter__(self) -> "_CudaAnswersAsMeta":
        """Not before the groups are made: seeding their generators needs a device that has some."""
        self.current_device = torch.cuda.current_device
        vars(torch.cuda)["current_device"] = lambda: META
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """What was asked before is asked again."""
        super().__exit__(*error)
        vars(torch.cuda)["current_device"] = self.current_device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch function with CUDA devices replaced."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = META
        result = func(*args, **kwargs)
        # megatron-core sorts parameters by this string.
        if func is torch.Tensor.type and len(args) == 1:
            return "torch.cuda." + result.rpartition(".")[2]
        return result


@contextmanager
def fake_world(config: Config, rank: int, world_size: int) -> Iterator[Layout]:
    """Be `rank` of a world that is not there; on leaving, every group is gone again."""
    # Beneath meta, on a host with GPUs too: generators, which meta has none of, are the CPU's.
    with cpu_adapter():
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            layout = place_in_grid(config, META)
            with _CudaAnswersAsMeta():
                yield layout
        finally:
            stop_distributed()
