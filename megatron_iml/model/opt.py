"""OPT: embedding, decoder, LM head and loss, on one pipeline stage of megatron-core.

What enters: one packed row (`MicroBatch`) on every rank of every stage; tokens on the first, targets on the
last. What leaves: hidden states [T, 1, F] for the next stage, or on the last stage `TargetLosses`, their sum
and the negative log-likelihood of each target, fp32 [M]. Labels are pairs (target_rows, target_ids), so the
LM head runs on target rows only.

    losses = model(micro_batch);  losses.total      # divided once, by the global number of targets

Read `layer.py` for a layer. Attributes that megatron-core reads by name: pre_process, post_process, vp_stage,
model_type, share_embeddings_and_output_weights, embedding, output_layer, and `set_input_tensor`.

Shapes: T slots of the row, M targets, F features, V vocabulary rows here, B sequences being decoded.
"""

from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
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

from megatron_iml.config import POSITION_OFFSET, ModelConfig
from megatron_iml.parallel.groups import Layout

from .cache import DecodeContext
from .dropout import EMBEDDING_LAYER, DropoutPlan, key_of
from .head import TargetHead, TargetLosses
from .layer import LayerNorm, OPTLayer
from .ops import Ops
from .row import MicroBatch, RowContext


class OPTEmbedding(MegatronModule):
    """Vocabulary-parallel word embedding plus learned positions, then dropout."""

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, plan: DropoutPlan, ops: Ops, layout: Layout
    ) -> None:
        super().__init__(config=config)
        self.plan, self.ops, self.tp_group = plan, ops, layout.groups.tp
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size,
            config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=self.tp_group,
        )
        # Whole on every tensor rank: 2,050 rows are not worth cutting.
        self.position_embeddings = torch.nn.Embedding(
            model.max_position_embeddings + POSITION_OFFSET,
            config.hidden_size,
            dtype=config.params_dtype,
            device=layout.device,
        )

    def forward(self, tokens_T: Tensor, positions_T: Tensor, keys_LP: Tensor | None) -> Tensor:
        """Embed slots; without keys nothing is dropped. Returns [T, 1, F]."""
        hidden_TF = self.word_embeddings(tokens_T) + self.position_embeddings(positions_T + POSITION_OFFSET)
        hidden_T1F = hidden_TF[:, None, :]
        first_slot = 0
        if self.config.sequence_parallel:
            # After the sum: a scatter of the words alone would need positions cut as well.
            hidden_T1F = scatter_to_sequence_parallel_region(hidden_T1F, group=self.tp_group)
            first_slot = self.tp_group.rank() * hidden_T1F.shape[0]
        # Evaluation, decoding, or no dropout in this run.
        if keys_LP is None:
            return hidden_T1F
        key = key_of(keys_LP, EMBEDDING_LAYER, "embedding")
        return self.ops.bias_dropout_add(hidden_T1F, None, None, self.plan.embedding, key, first_slot)


class OPTModel(LanguageModule):
    """One stage of OPT (the whole model without pipeline parallelism)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        layout: Layout,
        plan: DropoutPlan,
        ops: Ops,
        selective_recompute: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=layout.groups)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # megatron-core sums the two copies' gradients over the first and last stage if this is set.
        self.share_embeddings_and_output_weights = True
        self.plan, self.ops = plan, ops
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = OPTEmbedding(config, model, plan, ops, layout)
        layer = ModuleSpec(
            module=OPTLayer, params={"plan": plan, "ops": ops, "selective_recompute": selective_recompute}
        )
        norm = ModuleSpec(module=LayerNorm, params={"ops": ops})
        num_layers = get_num_layers_to_build(config, vp_stage, layout.pipeline_rank)
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=layout.groups,
            vp_stage=vp_stage,
        )
        if post_process:
            # Tied: where this stage also embeds, the embedding is the head and this layer holds no weight.
            self.output_layer = TargetHead(
                config.hidden_size,
                model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process,
                tp_group=layout.groups.tp,
            )
        self.first_layer = get_transformer_layer_offset(config, vp_stage, layout.pipeline_rank)
        # Marks the last stage's copy as shared, so that the gradient norm counts it once. Under a pipeline a
        # collective of the first and last stage: what it sums is overwritten when weights are filled.
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Called by the pipeline schedule with the previous stage's hidden states."""
        # A list of one from the schedule, the tensor itself from a dry run.
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor | TargetLosses:
        """Hidden states [T, 1, F], or on the last stage the losses of the row's targets."""
        context = batch.context
        # Once per row and chunk: recomputed layers read the same tensor again.
        if self.training and self.plan.drops:
            layers = range(self.first_layer, self.first_layer + len(self.decoder.layers))
            keys_LP = self.plan.keys(context.row, layers, batch.positions_T.device)
            # A copy: the same batch object may be run again, forward only.
            context = replace(context, keys_LP=keys_LP)
        # On later stages it stays None: the block then takes what `set_input_tensor` was given.
        hidden_T1F = None
        if self.pre_process:
            hidden_T1F = self.embedding(batch.tokens_T, batch.positions_T, context.keys_LP)
        hidden_T1F = self._decode(hidden_T1F, context)
        if not self.post_process:
            return hidden_T1F
        weight_VF = self.shared_embedding_or_output_weight()
        return self.output_layer(self.ops, hidden_T1F, weight_VF, batch)

    def next_token_logits(
        self, tokens_T: Tensor, positions_T: Tensor, context: RowContext | DecodeContext, rows_B: Tensor
    ) -> Tensor:
        """Logits over the whole vocabulary [B, vocab_size] at `rows_B`; without pipeline parallelism."""
        hidden_T1F = self._decode(self.embedding(tokens_T, positions_T, None), context)
        # Before the head: of a row of prompts, only each one's last slot is continued.
        hidden_BF = hidden_T1F[:, 0].index_select(0, rows_B)
        logits_BV = hidden_BF @ self.shared_embedding_or_output_weight().t()
        return gather_from_tensor_model_parallel_region(logits_BV, group=self.tp_group)

    def _decode(self, hidden_T1F: Tensor | None, context: RowContext | DecodeContext) -> Tensor:
        # attention_mask stays None: no mask matrix exists, the bounds travel in the context.
        return self.decoder(hidden_states=hidden_T1F, attention_mask=None, packed_seq_params=context)
