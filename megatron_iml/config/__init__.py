"""Configuration: the schema, strict loading, the published sizes and the rules. Imports no torch.

config = load_config(Path("train.yaml"), ["training.steps=100"])
check_config(config, world_size=8)
"""

from megatron_iml.config.layout import (
    chunk_layers,
    data_parallel_size,
    micro_batches_per_step,
    place_of_rank,
    rows_per_step,
)
from megatron_iml.config.load import load_config, save_config
from megatron_iml.config.rules import check_config, check_layout
from megatron_iml.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)
from megatron_iml.config.sizes import OPT_SIZES, POSITION_OFFSET, OPTSize, opt_size, parameter_count

__all__ = [
    "OPT_SIZES",
    "POSITION_OFFSET",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OPTSize",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainingConfig",
    "check_config",
    "check_layout",
    "chunk_layers",
    "data_parallel_size",
    "load_config",
    "micro_batches_per_step",
    "opt_size",
    "parameter_count",
    "place_of_rank",
    "rows_per_step",
    "save_config",
]
