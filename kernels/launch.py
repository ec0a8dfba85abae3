"""What the launch of every Triton kernel here asks first: where do the tensors live, how wide is the chip.

    require_kernel_dtype("layer_norm", x)      ValueError for fp64 and integers
    require_kernel_device("layer_norm", x)     ValueError for a CPU tensor too, unless TRITON_INTERPRET=1
    num_multiprocessors(x.device)              132 on an H100

Triton itself is imported only here and in the kernel modules, which an op imports when it is first called:
without a GPU the project runs, and is imported, without Triton.
"""

import torch
from torch import Tensor

# Not fp64: every kernel adds up in fp32 and would pass that off as fp64.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require_kernel_device(op: str, tensor: Tensor) -> None:
    """Refuse a tensor that no Triton kernel can read.

    Raises:
        ValueError: not on a GPU while Triton's interpreter is off, or a type other than KERNEL_DTYPES.
    """
    import triton

    # The knob says what holds now; a kernel is bound to the interpreter, or not, when its module is imported:
    # the variable has to be set before that.
    if tensor.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"{op}: got a tensor on {tensor.device}; the kernel needs cuda, or any device under "
            f"TRITON_INTERPRET=1. Elsewhere call {op}_reference"
        )
    require_kernel_dtype(op, tensor)


def require_kernel_dtype(op: str, tensor: Tensor) -> None:
    """Refuse a tensor of a type that no kernel here reads; unlike the device, a question that torch.compile
    can look into.

    Raises:
        ValueError: a type other than KERNEL_DTYPES.
    """
    if tensor.dtype not in KERNEL_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in KERNEL_DTYPES)
        raise ValueError(f"{op}: got {tensor.dtype}; allowed: {allowed}. Call {op}_reference for others")


def require(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse an argument of another shape, type or device than it must have, or with gaps in memory.

    Raises:
        ValueError: with the argument's name, what was got and what is allowed.
    """
    # Arguments have no strides to the kernels outside attention: an address is row * features + column.
    got = (tuple(tensor.shape), tensor.dtype, tensor.device)
    if got != (shape, dtype, device) or not tensor.is_contiguous():
        gaps = "" if tensor.is_contiguous() else " with gaps in memory"
        raise ValueError(
            f"{op}: {name} is {got[0]} {got[1]} on {got[2]}{gaps}; it must be {shape} {dtype} on {device}, "
            "contiguous: convert it with .to() or .contiguous()"
        )


def num_multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; 2 in the interpreter, so that its runs have several."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
