"""How long this rank's own forward passes take: what tells a slow rank from those that wait for it.

A step lasts equally long on every rank, because ranks wait for one another in it. A chunk's forward waits for
no other stage and no other replica, only for tensor-parallel peers; so a slow GPU, or a stage with too much
work, shows here.

    timer = ForwardTimer(device)
    with timer.measure():                       # once per micro-batch and chunk
        output = chunk(batch)
    timer.take()                                # seconds since the last take
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardTimer:
    """Adds up spans: between CUDA events on a GPU, where the host runs ahead, by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time what is done inside."""
        # On the CPU an operation is done when its call returns.
        if not self.on_gpu:
            began = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - began
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # On the current stream, which the chunk's own kernels are on; the host does not wait.
        pair[0].record()
        yield
        pair[1].record()
        self.events.append(pair)

    def take(self) -> float:
        """The seconds so far, and start again.

        Waits for the last span: ask when all that follows it in a step is queued.
        """
        if self.events:
            # The last of one stream: all earlier ones are through by then.
            self.events[-1][1].synchronize()
        seconds = self.seconds + sum(began.elapsed_time(ended) for began, ended in self.events) / 1000
        self.seconds, self.events = 0.0, []
        return seconds
