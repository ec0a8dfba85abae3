"""Lets megatron-core run on the CPU, over gloo, when there is no CUDA.

megatron-core asks for `device="cuda"`, calls `.cuda()`, compares `tensor.type()` with
"torch.cuda.FloatTensor" and keeps CUDA generator states. `install_cpu_adapter` answers each of these with the
CPU, so that every tensor, sequence, pipeline and data parallel layout can be proven on a machine without a
GPU:

    install_cpu_adapter()                       # before the first process group; nothing where CUDA is
    torch.zeros(2, device="cuda").device        # cpu
    with cpu_adapter():                         # for a while, on a host with CUDA too
        ...

It is a patch. The others stand in for two kernels of Apex: the weight gradient (`model/ops.py`) and the
gradient's norm (`training/multi_tensor.py`). It costs some overhead per operation and
lives in one thread: a spawned process must install its own.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


def _as_cpu(device: Any) -> Any:
    """Map a CUDA device in any spelling to the CPU; leave everything else alone."""
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


class _CudaAnswersAsCpu(TorchFunctionMode):
    """Rewrites the three ways in which megatron-core names a GPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch function with CUDA devices replaced."""
        kwargs = kwargs or {}
        # The identity, so that a tensor keeps its storage and its place in the graph.
        if func is torch.Tensor.cuda:
            return args[0]
        # megatron-core sorts gradients into buffers by this string; with an argument it is a conversion.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _as_cpu(kwargs["device"])}
        # Devices come positionally too: `tensor.to("cuda")`.
        if any(isinstance(arg, str | torch.device) for arg in args):
            args = tuple(_as_cpu(arg) for arg in args)
        return func(*args, **kwargs)


class _CpuGenerators:
    """Stands for `torch.cuda.default_generators`: every index is the CPU's generator."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


class _CpuStream:
    """Stands for a CUDA stream: work on the CPU is already in order."""

    def wait_stream(self, stream: "_CpuStream") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


@contextmanager
def _no_stream(stream: Any) -> Iterator[None]:
    """Stands for `torch.cuda.stream`."""
    yield


@contextmanager
def cpu_adapter() -> Iterator[None]:
    """The CPU answers for CUDA in this thread, whether CUDA is there or not; then all is as it was."""
    # Entered twice, every torch function would be rewritten twice.
    if any(isinstance(mode, _CudaAnswersAsCpu) for mode in _get_current_function_mode_stack()):
        yield
        return
    from megatron.core.tensor_parallel import random

    stand_ins = (
        (torch.cuda, "current_device", _current_device),
        (torch.cuda, "synchronize", _nothing),
        (torch.cuda, "empty_cache", _nothing),
        (torch.cuda, "current_stream", _stream),
        (torch.cuda, "default_stream", _stream),
        (torch.cuda, "stream", _no_stream),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda.random, "get_rng_state", _get_rng_state),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "default_generators", _CpuGenerators()),
        (torch.cuda.nvtx, "range_push", _nothing),
        (torch.cuda.nvtx, "range_pop", _nothing),
        # CUDA queues generator updates until its first use, which never comes here: run them at once.
        # megatron-core has imported the name, so changing its origin alone would not reach it.
        (torch.cuda, "_lazy_call", _call_now),
        (random, "_lazy_call", _call_now),
    )
    # "CPU RNG state changed within GPU RNG context": here they are one generator, by design.
    log = logging.getLogger("megatron.core.tensor_parallel.random")
    before, level = [vars(owner)[name] for owner, name, _ in stand_ins], log.level
    log.setLevel(logging.ERROR)
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        with _CudaAnswersAsCpu():
            yield
    finally:
        for (owner, name, _), original in zip(stand_ins, before, strict=True):
            setattr(owner, name, original)
        log.setLevel(level)


_INSTALLED = ExitStack()
"""Never left: gradients are computed long after any `with` block would have ended."""


def install_cpu_adapter() -> None:
    """Enter `cpu_adapter` for good, outside of any block of it; without effect where CUDA is available."""
    if not torch.cuda.is_available():
        _INSTALLED.enter_context(cpu_adapter())


# A device, where CUDA gives a number: megatron-core passes it on as `device=`.
def _current_device() -> torch.device:
    return torch.device("cpu")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _stream(*args: Any, **kwargs: Any) -> _CpuStream:
    return _CpuStream()


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _call_now(callback: Callable[[], None], **kwargs: Any) -> None:
    callback()
