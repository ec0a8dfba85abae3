"""Launches that torch.compile does not look into: an operator of torch with a fake that knows the shapes.

    forward = opaque(_forward, _fake_forward)             # torch.ops.megatron_iml.forward
    y_TF = forward(x_TF, bias_F)                          # a graph holds it as one node

The gradient is not registered here: ops put such launches into a torch.autograd.Function, which torch.compile
traces. So a launch costs the host some 4 microseconds more than a call of Python does; a registered gradient
or torch's `custom_op` would cost ten times that, and a step of 24 layers makes some 300 launches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import library

_LIBRARY = library.Library("megatron_iml", "FRAGMENT")  # operators live as long as it does


def opaque(launch: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Any:
    """Register `launch` under its own name, without leading underscores, and return the operator.

    Args:
        launch: annotated with tensors and numbers; what it returns shares no memory with what it is given.
        fake: takes the same and returns empty tensors of the right shape, type and device.
        mutates: names of the arguments that it writes to.
    """
    # The name is global to the process, which is why launches carry their op's name in theirs.
    name = launch.__name__.lstrip("_")
    schema = library.infer_schema(launch, mutates_args=mutates)
    # The tag promises that schema and fake are true; tests/kernels/test_opaque.py holds every launch to it.
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    # CPU too: the interpreter runs there, and without it the launch itself refuses, with a remedy.
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, launch, device)
    library.register_fake(f"megatron_iml::{name}", fake, lib=_LIBRARY)
    # The overload: its packet would look for one at every call.
    return getattr(torch.ops.megatron_iml, name).default
