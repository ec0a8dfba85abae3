"""One OPT decoder layer: pre-norm attention inside documents, pre-norm ReLU feed-forward, biases everywhere.

    x = x + dropout(attention(layer_norm(x)))
    x = x + dropout(fc2(relu(fc1(layer_norm(x)))))

It fills the layer slot of megatron-core's TransformerBlock, which builds the stage's layers, recomputes them
in the backward when asked and shards their state; the parallel linears are megatron-core's too. The block
hands every layer the same `RowContext` (through the argument it calls packed_seq_params): who sees whom, and
which dropout masks to draw.

Shapes: T slots of the row (T / tensor size under sequence parallelism), N heads here, D head size, F
features.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megatron_iml.kernels.document_attention import document_attention_reference

from .cache import DecodeContext
from .dropout import DropoutPlan, dropout
from .row import RowContext


class LayerNorm(torch.nn.Module):
    """LayerNorm with affine weights. The constructor's signature is the one megatron-core builds norms
    with."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device="cuda"))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device="cuda"))
        for parameter in self.parameters():
            # Under sequence parallelism each rank sees its slots only: gradients are summed over the group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_T1F: Tensor) -> Tensor:
        """Normalise over features."""
        return torch.nn.functional.layer_norm(hidden_T1F, self.weight.shape, self.weight, self.bias, self.eps)


class SelfAttention(MegatronModule):
    """Fused query-key-value projection, document attention, output projection."""

    def __init__(
        self, config: TransformerConfig, layer_index: int, plan: DropoutPlan, selective: bool, tp_group: Any
    ) -> None:
        super().__init__(config=config)
        self.layer_index, self.plan, self.selective = layer_index, plan, selective
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_heads = config.num_attention_heads // tp_group.size()
        self.first_head = self.num_heads * tp_group.rank()
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            3 * config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            tp_group=tp_group,
        )
        self.linear_proj = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )

    def forward(self, hidden_T1F: Tensor, context: RowContext | DecodeContext) -> tuple[Tensor, Tensor]:
        """Return the projected attention output [T, 1, F] and the bias that is still to be added."""
        qkv_T1C, _ = self.linear_qkv(hidden_T1F)
        # Each head's query, key and value lie side by side, so a tensor-parallel slice is whole heads.
        qkv_TN3D = qkv_T1C.view(-1, self.num_heads, 3, self.head_dim)
        if isinstance(context, DecodeContext):
            out_TND = context.cache.attend(self.layer_index, qkv_TN3D)
        elif self.selective and self.training:
            out_TND = tensor_parallel.checkpoint(lambda qkv: self._attend(qkv, context), False, qkv_TN3D)
        else:
            out_TND = self._attend(qkv_TN3D, context)
        return self.linear_proj(out_TND.reshape(out_TND.shape[0], 1, -1))

    def _attend(self, qkv_TN3D: Tensor, context: RowContext) -> Tensor:
        if context.cache is not None:
            context.cache.fill(self.layer_index, qkv_TN3D)
        return document_attention_reference(
            qkv_TN3D,
            context.bounds,
            softmax_scale=self.head_dim**-0.5,
            dropout_probability=self.plan.attention if self.training else 0.0,
            dropout_key=self.plan.key(context.row, self.layer_index, "attention"),
            first_head=self.first_head,
        )


class FeedForward(MegatronModule):
    """fc1, ReLU, fc2."""

    def __init__(self, config: TransformerConfig, tp_group: Any) -> None:
        super().__init__(config=config)
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.ffn_hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=True,
            tp_group=tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            config.ffn_hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=tp_group,
        )

    def forward(self, hidden_T1F: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [T, 1, F] and the bias that is still to be added."""
        inner, inner_bias = self.linear_fc1(hidden_T1F)
        return self.linear_fc2(torch.relu(inner + inner_bias))


class OPTLayer(MegatronModule, BaseTransformerLayer):
    """A decoder layer in the signature TransformerBlock builds and calls."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        plan: DropoutPlan,
        selective_recompute: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        # TransformerBlock shards state by this 1-based global number.
        self.layer_number = layer_number + offset
        self.layer_index = self.layer_number - 1
        self.plan, self.tp_group = plan, pg_collection.tp
        self.input_layernorm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = SelfAttention(
            config, self.layer_index, plan, selective_recompute, pg_collection.tp
        )
        self.pre_mlp_layernorm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = FeedForward(config, pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, packed_seq_params: RowContext | DecodeContext, **unused: Any
    ) -> tuple[Tensor, None]:
        """Run the layer on [T, 1, F]. TransformerBlock passes further arguments that are all None for OPT."""
        context = packed_seq_params
        attention, bias = self.self_attention(self.input_layernorm(hidden_states), context)
        hidden_states = hidden_states + self._dropout(attention + bias, context, "attention_output")
        feed_forward, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        return hidden_states + self._dropout(feed_forward + bias, context, "feed_forward_output"), None

    def _dropout(self, hidden_T1F: Tensor, context: RowContext | DecodeContext, place: Any) -> Tensor:
        if not self.training or isinstance(context, DecodeContext):
            return hidden_T1F
        first_slot = self.tp_group.rank() * hidden_T1F.shape[0] if self.config.sequence_parallel else 0
        key = self.plan.key(context.row, self.layer_index, place)
        return dropout(hidden_T1F, self.plan.hidden, key, first_slot)
