"""megatron-core's two parallel linears as OPT uses them: weights cut by columns, then by rows.

    qkv = column_parallel(config, F, 3 * F, tp_group)                # x W^T + b
    inner = column_parallel(config, F, 4 * F, tp_group, ops.relu_gradient)    # relu(x W^T + b)
    outer = row_parallel(config, 4 * F, F, tp_group)                 # x W^T, parts summed over the ranks

All return (output, bias): the bias where a later pass adds it, else None. megatron-core adds the bias of a
column-cut linear in a pass of its own, which reads and writes the whole output once more; here the GEMM adds
it, and takes the ReLU, before it rounds and stores. The backward is megatron-core's.

Shapes: T slots of the row (T / tensor size in, under sequence parallelism), F input and C output features
here.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    RowParallelLinear,
    custom_bwd,
    custom_fwd,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _BiasInProduct(LinearWithGradAccumulationAndAsyncCommunication):
    """A product whose GEMM adds the bias and takes the ReLU."""

    @staticmethod
    @custom_fwd
    def forward(
        ctx: Any, input_T1F: Tensor, weight_CF: Tensor, bias_C: Tensor, relu: bool,
        gradient_accumulation_fusion: bool, allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any,
    ) -> Tensor:  # fmt: skip
        """The output [T, 1, C]; leaves in `ctx` what megatron-core's backward reads there."""
        if not weight_CF.requires_grad:
            raise ValueError(
                "this linear trains its weight: got a frozen one; allowed: requires_grad; leave it on"
            )
        ctx.save_for_backward(input_T1F, weight_CF)
        # Kept apart: a saved tensor must not change before the backward, and this one is being summed into.
        # Without one in evaluation, whose model has no gradient buffers.
        has_buffer = gradient_accumulation_fusion and hasattr(weight_CF, "main_grad")
        ctx.main_grad = weight_CF.main_grad if has_buffer else None  # type: ignore[attr-defined]
        # After a ReLU the gradient of the bias is no sum of what arrives here: `relu_gradient` makes it.
        ctx.use_bias = not relu
        ctx.gradient_accumulation_fusion = gradient_accumulation_fusion
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        # megatron-core can put weight gradients off until a pipeline drains; here that is never asked for.
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = None, None
        ctx.tp_group = tp_group

        if sequence_parallel:
            slots, *rest = input_T1F.shape
            # Not kept: the backward gathers again, as memory is what sequence parallelism saves.
            total_T1F = input_T1F.new_empty(slots * tp_group.size(), *rest)
            torch.distributed.all_gather_into_tensor(total_T1F, input_T1F, group=tp_group)
            input_T1F = total_T1F
        input_TF = input_T1F.flatten(0, 1)
        # Private in torch: the product of cuBLAS that takes the ReLU before it stores.
        multiply = torch._addmm_activation if relu else torch.addmm
        return multiply(bias_C, input_TF, weight_CF.t()).view(*input_T1F.shape[:2], -1)

    @staticmethod
    @custom_bwd
    def backward(ctx: Any, grad_T1C: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        gradients = LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, grad_T1C)
        # Then one None for each further argument of the forward above; megatron-core's takes other ones.
        return (*gradients[:3], None, None, None, None, None)


class _ColumnParallel(ColumnParallelLinear):
    """megatron-core's module around the product above."""

    def __init__(self, *arguments: Any, relu_gradient: Callable[..., Tensor] | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.relu_gradient = relu_gradient

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor, *, gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool, sequence_parallel: bool, tp_group: Any, **unused: None,
    ) -> Tensor:  # fmt: skip
        has_relu = self.relu_gradient is not None
        output = _BiasInProduct.apply(
            input, weight, bias, has_relu, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel,
            tp_group,
        )  # fmt: skip
        return output if self.relu_gradient is None else self.relu_gradient(output, bias)


def column_parallel(
    config: TransformerConfig,
    inputs: int,
    outputs: int,
    tp_group: Any,
    relu_gradient: Callable[..., Tensor] | None = None,
) -> ColumnParallelLinear:
    """A linear with bias whose output features are divided over the tensor ranks.

    With `relu_gradient` (`ops.py`), which has the backward of bias and ReLU, it takes the ReLU of its output.
    """
    return _ColumnParallel(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        # The next linear is cut by rows and takes the parts as they are.
        gather_output=False,
        tp_group=tp_group,
        relu_gradient=relu_gradient,
    )


def row_parallel(config: TransformerConfig, inputs: int, outputs: int, tp_group: Any) -> RowParallelLinear:
    """A linear that takes divided features and sums over the tensor ranks; never adds its bias."""
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        # Scaled down with depth: its output goes into the residual stream.
        init_method=config.output_layer_init_method,
        bias=True,
        input_is_parallel=True,
        # Added in the pass that drops and adds the residual.
        skip_bias_add=True,
        tp_group=tp_group,
    )
