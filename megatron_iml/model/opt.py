"""OPT: embedding, decoder, LM head and loss, on one pipeline stage of megatron-core.

What enters: one packed row (`MicroBatch`) on every rank of every stage; tokens on the first, targets on the
last. What leaves: hidden states [T, 1, F] for the next stage, or on the last stage the negative
log-likelihood of each target, fp32 [M]. Labels are pairs (target_rows, target_ids), so the LM head runs on
target rows only.

    losses_M = model(micro_batch);  losses_M.sum()      # divided once, by the global number of targets

Read `layer.py` for a layer. Attributes that megatron-core reads by name: pre_process, post_process, vp_stage,
model_type, share_embeddings_and_output_weights, embedding, output_layer, and `set_input_tensor`.

Shapes: T slots of the row, M targets, F features, V vocabulary rows here, B sequences being decoded.
"""

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_iml.config import ModelConfig
from megatron_iml.parallel.groups import Layout

from .cache import DecodeContext
from .dropout import DropoutPlan, dropout
from .layer import LayerNorm, OPTLayer
from .row import MicroBatch, RowContext

POSITION_OFFSET = 2
"""OPT's table has two rows before the first position: fairseq's padding index 1, plus one."""


class OPTEmbedding(MegatronModule):
    """Vocabulary-parallel word embedding plus learned positions, then dropout."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, plan: DropoutPlan, layout: Layout
    ) -> None:
        super().__init__(config=config)
        self.plan, self.tp_group = plan, layout.groups.tp
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=self.tp_group,
        )
        self.position_embeddings = torch.nn.Embedding(
            model.max_position_embeddings + POSITION_OFFSET,
            config.hidden_size,
            dtype=config.params_dtype,
            device=layout.device,
        )

    def forward(self, tokens_T: Tensor, positions_T: Tensor, row: int | None) -> Tensor:
        """Embed slots; `row` is None while decoding, when nothing is dropped. Returns [T, 1, F]."""
        hidden_TF = self.word_embeddings(tokens_T) + self.position_embeddings(positions_T + POSITION_OFFSET)
        hidden_T1F = hidden_TF[:, None, :]
        first_slot = 0
        if self.config.sequence_parallel:
            hidden_T1F = scatter_to_sequence_parallel_region(hidden_T1F, group=self.tp_group)
            first_slot = self.tp_group.rank() * hidden_T1F.shape[0]
        if not self.training or row is None:
            return hidden_T1F
        return dropout(hidden_T1F, self.plan.embedding, self.plan.key(row, -1, "embedding"), first_slot)


class OPTModel(LanguageModule):
    """One stage of OPT (the whole model without pipeline parallelism)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        layout: Layout,
        plan: DropoutPlan,
        selective_recompute: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=layout.groups)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = True
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = OPTEmbedding(config, model, plan, layout)
        layer = ModuleSpec(module=OPTLayer, params={"plan": plan, "selective_recompute": selective_recompute})
        num_layers = get_num_layers_to_build(config, vp_stage, layout.pipeline_rank)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=LayerNorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=layout.groups,
            vp_stage=vp_stage,
        )
        if post_process:
            # Tied: on the first stage too, the embedding is the head and this layer holds no weight.
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process,
                tp_group=layout.groups.tp,
            )
        self.first_layer = get_transformer_layer_offset(config, vp_stage, layout.pipeline_rank)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Called by the pipeline schedule with the previous stage's hidden states."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Hidden states [T, 1, F], or on the last stage each target's negative log-likelihood, fp32 [M]."""
        hidden_T1F = None
        if self.pre_process:
            hidden_T1F = self.embedding(batch.tokens_T, batch.positions_T, batch.context.row)
        hidden_T1F = self._decode(hidden_T1F, batch.context)
        if not self.post_process:
            return hidden_T1F
        assert batch.target_rows_M is not None and batch.target_ids_M is not None, (
            "the last stage got no targets"
        )
        logits_M1V = self._logits(hidden_T1F, batch.target_rows_M)
        return vocab_parallel_cross_entropy(logits_M1V, batch.target_ids_M[:, None]).squeeze(1)

    def next_token_logits(
        self, tokens_T: Tensor, positions_T: Tensor, context: RowContext | DecodeContext, rows_B: Tensor
    ) -> Tensor:
        """Logits over the whole vocabulary [B, vocab_size] at `rows_B`; without pipeline parallelism."""
        row = context.row if isinstance(context, RowContext) else None
        hidden_T1F = self._decode(self.embedding(tokens_T, positions_T, row), context)
        logits_B1V = self._logits(hidden_T1F, rows_B)
        return gather_from_tensor_model_parallel_region(logits_B1V, group=self.tp_group).squeeze(1)

    def _decode(self, hidden_T1F: Tensor | None, context: RowContext | DecodeContext) -> Tensor:
        # attention_mask stays None: no mask matrix exists, the bounds travel in the context.
        return self.decoder(hidden_states=hidden_T1F, attention_mask=None, packed_seq_params=context)

    def _logits(self, hidden_T1F: Tensor, rows_M: Tensor) -> Tensor:
        """Vocabulary-parallel logits [M, 1, V] of the given rows only."""
        if self.config.sequence_parallel:
            hidden_T1F = gather_from_sequence_parallel_region(
                hidden_T1F, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return linear_with_grad_accumulation_and_async_allreduce(
            hidden_T1F.index_select(0, rows_M),
            self.shared_embedding_or_output_weight(),
            None,
            gradient_accumulation_fusion=False,
            # Under sequence parallelism the gather's backward already sums over the group.
            allreduce_dgrad=self.tp_group.size() > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )
