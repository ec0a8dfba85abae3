"""The libraries that write a checkpoint, as its record names them: {"python": "3.11.7", "torch": "2.13"}."""

from importlib.metadata import version
from platform import python_version

import torch


def versions() -> dict[str, str]:
    """Name -> version."""
    # From the installed package: megatron.core takes seconds to import, and a conversion needs none of it.
    return {"python": python_version(), "torch": torch.__version__, "megatron_core": version("megatron-core")}
