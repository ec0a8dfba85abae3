"""What many tests need: a small resolved config, and megatron-core's groups around a single rank."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_iml.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_iml.parallel.groups import Layout, start_distributed, stop_distributed

CPU_ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore",
    # As in examples/train_cpu.sh: half the time of these tests is imports.
    "TORCH_COMPILE_DISABLE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
"""For commands in processes of their own."""


def tiny_config(precision: str = "fp32", parallel: ParallelConfig | None = None, **model) -> Config:
    """A config of a tiny OPT without dropout; keyword arguments replace fields of the model section."""
    fields = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "init_method_std": 0.05,
        "initialisation": "random",
        "kernel_backend": "reference",
    } | model
    shape = ModelConfig(**({"ffn_hidden_size": 4 * fields["hidden_size"]} | fields))
    return Config(
        model=shape,
        parallel=parallel or ParallelConfig(),
        training=TrainingConfig(precision=precision, steps=4, global_batch_positions=128),
    )


@contextmanager
def single_rank(config: Config) -> Iterator[Layout]:
    """This process as a world of one."""
    alone = dataclasses.replace(config, parallel=ParallelConfig())
    layout = start_distributed(alone)
    try:
        yield layout
    finally:
        stop_distributed()
