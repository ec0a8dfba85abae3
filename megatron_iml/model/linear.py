"""megatron-core's two parallel linears as OPT uses them: weights cut by columns, then by rows.

    inner = column_parallel(config, F, 4 * F, tp_group)      # each rank makes its features
    outer = row_parallel(config, 4 * F, F, tp_group)         # each rank's part of the sum, summed over ranks

Both return (output, bias): the bias where a later pass adds it, else None.
"""

from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


def column_parallel(
    config: TransformerConfig, inputs: int, outputs: int, tp_group: Any, skip_bias_add: bool = False
) -> ColumnParallelLinear:
    """A linear whose output features are divided over the tensor ranks."""
    return ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        # The next linear is cut by rows and takes the parts as they are.
        gather_output=False,
        skip_bias_add=skip_bias_add,
        tp_group=tp_group,
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
