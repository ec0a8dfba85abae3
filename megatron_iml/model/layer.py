"""One OPT decoder layer: pre-norm attention inside documents, pre-norm ReLU feed-forward, biases everywhere.

    x = x + dropout(attention(layer_norm(x)))
    x = x + dropout(fc2(relu(fc1(layer_norm(x)))))

It fills the layer slot of megatron-core's TransformerBlock, which builds the stage's layers, recomputes them
in the backward when asked and shards their state; the parallel linears are megatron-core's too. The block
hands every layer the same `RowContext` (through the argument it calls packed_seq_params): who sees whom, and
which dropout masks to draw.

Shapes: T slots of the row (T / tensor size under sequence parallelism), N heads here, D head size, F
features, I features inside the feed-forward here.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor

from megatron_iml.kernels.philox import Place

from .cache import DecodeContext
from .dropout import DropoutPlan, key_of
from .linear import column_parallel, row_parallel
from .ops import Ops
from .row import RowContext


class LayerNorm(torch.nn.Module):
    """LayerNorm with affine weights. The constructor's signature is the one megatron-core builds norms
    with."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = eps, ops
        # "cuda" as megatron-core says it: where there is none, `parallel/` answers with the CPU or meta.
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device="cuda"))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device="cuda"))
        for parameter in self.parameters():
            # Under sequence parallelism each rank sees its slots only: gradients are summed over the group.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_T1F: Tensor) -> Tensor:
        """Normalise over features."""
        return self.ops.layer_norm(hidden_T1F, self.weight, self.bias, self.eps)


class ResidualLayerNorm(LayerNorm):
    """Hands on what it normalises, so that its gradient and the residual's are added in one pass."""

    def forward(self, hidden_T1F: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the norm and the hidden states, both [T, 1, F]."""
        return self.ops.layer_norm_residual(hidden_T1F, self.weight, self.bias, self.eps)


class AddLayerNorm(LayerNorm):
    """Adds a sub-layer's bias, dropout and residual, and normalises the sum, in one pass."""

    # A module rather than a call with another module's weights: overlapped parameter gathers wait for a
    # weight when the module that owns it is called, and for no other reason.
    def forward(  # type: ignore[override]
        self,
        update_T1F: Tensor,
        bias_F: Tensor,
        residual_T1F: Tensor,
        probability: float,
        key: Tensor | None,
        first_slot: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum, both [T, 1, F]."""
        return self.ops.add_layer_norm(
            update_T1F, bias_F, residual_T1F, self.weight, self.bias, self.eps, probability, key, first_slot
        )


class SelfAttention(MegatronModule):
    """Fused query-key-value projection, document attention, output projection."""

    def __init__(
        self,
        config: TransformerConfig,
        chunk_index: int,
        plan: DropoutPlan,
        selective: bool,
        ops: Ops,
        tp_group: Any,
    ) -> None:
        super().__init__(config=config)
        self.chunk_index, self.plan, self.selective, self.ops = chunk_index, plan, selective, ops
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_heads = config.num_attention_heads // tp_group.size()
        self.first_head = self.num_heads * tp_group.rank()
        # One GEMM for the three: cut by heads, see `forward`.
        self.linear_qkv = column_parallel(config, config.hidden_size, 3 * config.hidden_size, tp_group)
        self.linear_proj = row_parallel(config, config.hidden_size, config.hidden_size, tp_group)

    def forward(self, hidden_T1F: Tensor, context: RowContext | DecodeContext) -> tuple[Tensor, Tensor]:
        """Return the projected attention output [T, 1, F] and the bias that is still to be added."""
        qkv_T1C, _ = self.linear_qkv(hidden_T1F)
        # Each head's query, key and value lie side by side, so a tensor-parallel slice is whole heads; the
        # converters put the rows of other people's weights into this order.
        qkv_TN3D = qkv_T1C.view(-1, self.num_heads, 3, self.head_dim)
        if isinstance(context, DecodeContext):
            out_TND = context.cache.attend(self.chunk_index, qkv_TN3D)
        elif self.selective and self.training:
            # Masks are functions of the row: recomputing needs no saved generator state. False: the input is
            # not cut over tensor ranks, as it holds this rank's heads only.
            out_TND = tensor_parallel.checkpoint(lambda qkv: self._attend(qkv, context), False, qkv_TN3D)
        else:
            out_TND = self._attend(qkv_TN3D, context)
        # [T, N, D] -> [T, 1, N D], the features that the projection is cut by.
        return self.linear_proj(out_TND.reshape(out_TND.shape[0], 1, -1))

    def _attend(self, qkv_TN3D: Tensor, context: RowContext) -> Tensor:
        if context.cache is not None:
            context.cache.fill(self.chunk_index, qkv_TN3D)
        return self.ops.document_attention(
            qkv_TN3D,
            context.bounds,
            softmax_scale=self.head_dim**-0.5,
            **self._dropout(context),
            first_head=self.first_head,
        )

    def _dropout(self, context: RowContext) -> dict[str, Any]:
        if context.keys_LP is None:
            return {}
        # By index in the chunk, since `keys_LP` holds this chunk's layers only.
        key = key_of(context.keys_LP, self.chunk_index, "attention")
        return {"dropout_probability": self.plan.attention, "dropout_key": key}


class FeedForward(MegatronModule):
    """fc1, ReLU, fc2."""

    def __init__(self, config: TransformerConfig, ops: Ops, tp_group: Any) -> None:
        super().__init__(config=config)
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.linear_fc1 = column_parallel(config, hidden, inner, tp_group, ops.relu_gradient)
        self.linear_fc2 = row_parallel(config, inner, hidden, tp_group)

    def forward(self, hidden_T1F: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [T, 1, F] and the bias that is still to be added."""
        inner_T1I, _ = self.linear_fc1(hidden_T1F)
        return self.linear_fc2(inner_T1I)


class OPTLayer(MegatronModule, BaseTransformerLayer):
    """A decoder layer in the signature TransformerBlock builds and calls."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        plan: DropoutPlan,
        ops: Ops,
        selective_recompute: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        # TransformerBlock shards state by this 1-based global number.
        offset = get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.layer_number = layer_number + offset
        # TransformerBlock counts from 1 within the chunk.
        self.chunk_index = layer_number - 1
        self.plan, self.ops, self.tp_group = plan, ops, pg_collection.tp
        hidden_size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_layernorm = ResidualLayerNorm(config, hidden_size, eps, ops)
        self.self_attention = SelfAttention(
            config, self.chunk_index, plan, selective_recompute, ops, pg_collection.tp
        )
        self.pre_mlp_layernorm = AddLayerNorm(config, hidden_size, eps, ops)
        self.mlp = FeedForward(config, ops, pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, packed_seq_params: RowContext | DecodeContext, **unused: Any
    ) -> tuple[Tensor, None]:
        """Run the layer on [T, 1, F]. TransformerBlock passes further arguments that are all None for OPT."""
        context, slots = packed_seq_params, hidden_states.shape[0]
        # Biases and residuals wait for the next pass over [T, 1, F] instead of making passes of their own.
        normed, hidden_states = self.input_layernorm(hidden_states)
        attention, bias = self.self_attention(normed, context)
        dropout = self._dropout(context, "attention_output", slots)
        normed, hidden_states = self.pre_mlp_layernorm(attention, bias, hidden_states, *dropout)
        feed_forward, bias = self.mlp(normed)
        dropout = self._dropout(context, "feed_forward_output", slots)
        # The second value is cross-attention's context, which TransformerBlock expects of every layer.
        return self.ops.bias_dropout_add(feed_forward, bias, hidden_states, *dropout), None

    def _dropout(
        self, context: RowContext | DecodeContext, place: Place, slots: int
    ) -> tuple[float, Tensor | None, int]:
        """Probability, key, and global index of the first slot here."""
        if isinstance(context, DecodeContext) or context.keys_LP is None:
            return 0.0, None, 0
        # A mask depends on the slot in the whole row, whichever rank holds it.
        first_slot = self.tp_group.rank() * slots if self.config.sequence_parallel else 0
        return self.plan.hidden, key_of(context.keys_LP, self.chunk_index, place), first_slot
