"""Builds this rank's part of OPT: one chunk, or several under interleaved pipelining.

chunks = build_model(config, layout)      # weights allocated on layout.device, not yet filled
initialise(chunks, config.model, config.training.seed, layout)
"""

from megatron_iml.config import Config
from megatron_iml.parallel.groups import Layout

from .dropout import DropoutPlan
from .ops import choose_ops, offer_weight_gradient
from .opt import OPTModel
from .transformer_config import build_transformer_config


def build_model(config: Config, layout: Layout) -> list[OPTModel]:
    """Allocate the chunks of this rank's stage in order of depth."""
    model = config.model
    # The seed of the weights too: theirs are drawn by name, masks by row and place.
    plan = DropoutPlan(
        seed=config.training.seed,
        hidden=model.hidden_dropout,
        attention=model.attention_dropout,
        embedding=model.embedding_dropout,
    )
    ops = choose_ops(model.kernel_backend, model.attention_backend, layout.device)
    # Before the linears: told to accumulate gradients in the GEMM, they refuse to be built without it.
    offer_weight_gradient()
    transformer_config = build_transformer_config(config, layout.device)
    chunks = []
    # Interleaved, only the first chunk of the first stage embeds and only the last of the last predicts.
    for virtual_rank in range(layout.virtual_size):
        chunk = OPTModel(
            transformer_config,
            model,
            layout,
            plan,
            ops,
            selective_recompute=config.parallel.recompute_granularity == "selective",
            pre_process=layout.is_first_stage and virtual_rank == 0,
            post_process=layout.is_last_stage and virtual_rank == layout.virtual_size - 1,
            vp_stage=virtual_rank if layout.virtual_size > 1 else None,
        )
        chunks.append(chunk.to(layout.device))
    return chunks
