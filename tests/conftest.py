"""Tests that need GPUs skip, with the reason, where there are too few of them."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by what it changes; explore with more of them:
# pytest --hypothesis-profile=default --hypothesis-seed=0
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# Triton reads this when it is imported, and megatron-core imports it, so no later place will do: without a
# GPU the kernels' own tests run them in Triton's interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GPUS_NEEDED = {"gpu": 1, "multigpu": 2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put a skip on every test marked gpu or multigpu that this machine cannot run."""
    marked = [
        (item, count)
        for item in items
        for name, count in GPUS_NEEDED.items()
        if item.get_closest_marker(name)
    ]
    if not marked:
        return
    import torch  # here, since it takes seconds and most selections have no such test

    present = torch.cuda.device_count()
    for item, count in marked:
        if present < count:
            item.add_marker(
                pytest.mark.skip(reason=f"needs {count} CUDA GPUs or more; this machine has {present}")
            )
