"""From our `Config` to megatron-core's `TransformerConfig`: the engine's 243 fields, of which OPT needs
these.

    build_transformer_config(config)   ->   TransformerConfig(num_layers=12, hidden_size=768, ...)

Traps answered here, each silent in megatron-core 0.16: batched point-to-point crosses messages in an
interleaved pipeline of two stages, and overlapped point-to-point with output deallocation sends overwritten
data on gloo, so neither is used; losses stay sums (`calculate_per_token_loss`), which the update divides once
by the global number of targets.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_iml.config import Config, chunk_layers

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    """Weights come from `initialise.py` or from a checkpoint, never from a rank's generator.

    Not `perform_initialization=False`: that leaves the tensor-parallel attributes unset, and megatron-core
    then leaves those weights out of the gradient norm.
    """
    return weight


def pipeline_layout(config: Config) -> list[list[str]] | None:
    """What each chunk holds, in order of depth, in megatron-core's words; None without a pipeline.

    [["embedding", "decoder"], ["decoder", "decoder", "loss"]] for 3 layers as (1, 2). Said even where the
    layers divide evenly: one way to number layers is enough.
    """
    if config.parallel.pipeline_model_parallel_size == 1:
        return None
    chunks = [["decoder"] * layers for layers in chunk_layers(config)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def build_transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """Translate a resolved configuration. The model section must have its shape filled in."""
    model, parallel = config.model, config.parallel
    precision = config.training.precision
    recompute = parallel.recompute_granularity
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        # OPT's, in every size.
        layernorm_epsilon=1e-5,
        add_bias_linear=True,
        activation_func=torch.nn.functional.relu,
        # Our masks come from `DropoutPlan`; megatron-core draws none, but is told the truth.
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        embedding_init_method=leave_uninitialised,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=PRECISIONS[precision],
        pipeline_dtype=PRECISIONS[precision],
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=pipeline_layout(config),
        sequence_parallel=parallel.sequence_parallel,
        # Selective recomputation is ours (`layer.py`): megatron-core's hooks sit in its own attention.
        recompute_granularity="full" if recompute == "full" else None,
        recompute_method=parallel.recompute_method if recompute == "full" else None,
        recompute_num_layers=parallel.recompute_num_layers if recompute == "full" else None,
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        overlap_p2p_comm=False,
        # Hidden states already sent need only their graph; safe because sends are not overlapped.
        deallocate_pipeline_outputs=True,
        # Weight gradients go straight into the fp32 buffers (ops.py); on the CPU they stay plain.
        gradient_accumulation_fusion=device.type == "cuda",
        # megatron-core's fusions are for its own modules, which ours replace.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
