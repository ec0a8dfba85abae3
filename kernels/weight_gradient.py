"""A weight's gradient added to its fp32 buffer by the GEMM itself.

    main_grad_OF += grad_output_TO^T @ input_TF

The low-precision product never exists: the GEMM reads and writes the fp32 buffer, so nothing is rounded
between micro-batches and no [O, F] temporary is allocated.

    grad_output [[1, 2]], input [[3, 4, 5]], main_grad 0  ->  [[3, 4, 5], [6, 8, 10]]

Shapes: T tokens, O output features, F input features.
"""

import torch
from torch import Tensor

from .opaque import opaque


def accumulate_weight_gradient(main_grad_OF: Tensor, grad_output_TO: Tensor, input_TF: Tensor) -> None:
    """main_grad += grad_output^T @ input, in place, products and sums in fp32.

    Args:
        main_grad_OF: fp32 [outputs, inputs], contiguous.
        grad_output_TO, input_TF: [tokens, outputs] and [tokens, inputs] of one floating type, rows
            contiguous.

    Raises:
        ValueError: the buffer is not fp32.
    """
    if main_grad_OF.dtype != torch.float32:
        raise ValueError(
            f"accumulate_weight_gradient: main_grad is {main_grad_OF.dtype}, must be torch.float32; "
            "keep gradients in fp32 (grad_reduce_in_fp32)"
        )
    _accumulate(main_grad_OF, grad_output_TO, input_TF)


def _weight_gradient(main_grad_OF: Tensor, grad_output_TO: Tensor, input_TF: Tensor) -> None:
    # A view: GEMMs read a transposed operand where it lies.
    grad_output_OT = grad_output_TO.t()
    if input_TF.dtype == torch.float32:
        main_grad_OF.addmm_(grad_output_OT, input_TF)
    elif input_TF.is_cuda:
        # cuBLAS adds 16-bit products up in fp32; without out_dtype it would round the sum before it is added.
        torch.addmm(main_grad_OF, grad_output_OT, input_TF, out_dtype=torch.float32, out=main_grad_OF)
    else:
        # torch has no mixed-precision GEMM on the CPU.
        main_grad_OF.addmm_(grad_output_OT.float(), input_TF.float())


# The schema says what is written to: a graph neither drops the call, which returns nothing, nor moves a read
# of the buffer past it.
_accumulate = opaque(_weight_gradient, lambda *unused: None, mutates=("main_grad_OF",))


def accumulate_weight_gradient_reference(
    main_grad_OF: Tensor, grad_output_TO: Tensor, input_TF: Tensor
) -> None:
    """The same in fp64, rounded to the buffer's type once."""
    product_OF = grad_output_TO.double().t() @ input_TF.double()
    main_grad_OF.copy_(main_grad_OF.double() + product_OF)
