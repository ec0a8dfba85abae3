"""Gradient buffers and the distributed optimizer around a model.

    wrapped = wrap_model(chunks, config)             # megatron-core's DDP: contiguous fp32 gradients
    optimizer = build_optimizer(wrapped, config)     # fp32 weights and moments, cut over data ranks

Two remedies for megatron-core 0.16.1 live here, both for checkpoints that reshard: our Adam (`adam.py`) takes
the place of torch's, and `ReshardableOptimizer` saves and loads each data rank's own slices of the state,
where megatron-core gathers all of them on every rank, and shifts them where a gradient bucket is padded.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as EngineOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_iml.config import Config
from megatron_iml.model.opt import OPTModel
from megatron_iml.model.transformer_config import PRECISIONS

from .adam import Adam
from .boxes import boxes_of_range
from .multi_tensor import offer_l2_norm

STATE_PREFIX = "optimizer.state."
"""What the names of optimizer state begin with in a checkpoint; then `param.`, `exp_avg.` or `exp_avg_sq.`"""


class ReshardableOptimizer(DistributedOptimizer):
    """A distributed optimizer that saves its state in the form of the parameters, from where it lies.

    megatron-core's `fully_reshardable` form is kept: a tensor per parameter and kind of state, which any
    layout can read. What changes is the way there. megatron-core gathers the whole state on every data rank
    (12 bytes a parameter of host memory each, at every save and load) and packs buckets without the padding
    between them, but cuts parameters out at offsets that include it: with any padded bucket but the last,
    every later parameter is saved shifted, silently. Overlapped reduction, a tied embedding under a pipeline
    (a bucket of its own) and data-parallel sizes that are not powers of two all cause it. Here every rank
    writes the boxes that its own ranges of the parameters make up: nothing is gathered, and no offset into a
    buffer is used.
    """

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What megatron-core makes of its `fully_reshardable` form, without collecting garbage afterwards.

        Its `gc.collect()` is for runs that switched the collector off, in which gathered state might stay. It
        walks every object of the process (420,000 of them, 0.3 to 0.5 s on a CPU) while training stands
        still. Here nothing is gathered, and what a save makes is freed when the last reference goes.
        """
        form = (metadata or {}).get("distrib_optim_sharding_type")
        assert form == "fully_reshardable", f"checkpoint form {form}; this optimizer knows fully_reshardable"
        state = self.state_dict()
        if is_loading:
            # Makes the moments where no update has: a load fills tensors that are there.
            self.load_state_dict(self.state_dict())
        state["param_state"] = self.sharded_param_state_fully_reshardable(
            model_sharded_state_dict, is_loading, metadata
        )
        # By this its load_state_dict chooses how to take `param_state` apart.
        state["param_state_sharding_type"] = form
        return state

    def sharded_param_state_fully_reshardable(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, list[ShardedTensor]]:
        """This rank's fp32 weights and moments; a load fills these very tensors."""
        values = nested_values(model_sharded_state_dict)
        # Tensors hash by identity, and what a ShardedTensor of a weight holds is the parameter itself.
        sharded = {value.data: value for value in values if isinstance(value, ShardedTensor)}
        state: dict[str, list[ShardedTensor]] = {}
        for parameter, held in self._held_ranges():
            # Adam keeps its step count elsewhere, so that all of these are tensors of the range's length.
            for kind, flat in self._get_main_param_and_optimizer_states(parameter).items():
                whole = sharded[parameter]
                # Counted, because layers of one kind share a checkpoint key; the count itself is not stored.
                state[f"{len(state)}.{kind}.{whole.key}"] = _boxes_of_state(kind, flat, held.start, whole)
        return state

    def load_parameter_state_from_fully_reshardable(self, state_dict: dict[str, Any]) -> None:
        """Nothing is left to do: the tensors above were filled in place."""

    def _held_ranges(self) -> Iterator[tuple[torch.nn.Parameter, Any]]:
        """Each parameter of which this data rank owns a part, and that part of its flattened elements."""
        # By buffer, then by (parameter, gradient) type, then by bucket.
        for buckets_of_dtype in self.gbuf_ranges:
            for buckets in buckets_of_dtype.values():
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        yield parameter, ranges["param"]


def _boxes_of_state(kind: str, flat: torch.Tensor, start: int, whole: ShardedTensor) -> list[ShardedTensor]:
    """A range of state, `flat`, as boxes of the tensor that belongs to the parameter `whole`.

    Args:
        kind: param, exp_avg or exp_avg_sq.
        flat: fp32 [elements of the range].
        start: where the range begins in this rank's flattened part of the parameter.
        whole: this rank's part of the parameter, with its place in the whole one.
    """
    # Layers of one kind are one tensor: its first axis, which the parameter lacks, is the layer's number.
    stacked, place = (1,) * whole.prepend_axis_num, whole.global_offset
    boxes, taken = [], 0
    for offset, size in boxes_of_range(whole.local_shape, start, start + len(flat)):
        data = flat[taken : taken + math.prod(size)].view(*stacked, *size)
        taken += data.numel()
        local = (*[0] * len(stacked), *offset)
        boxes.append(
            ShardedTensor(
                key=f"{STATE_PREFIX}{kind}.{whole.key}",
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_shape=whole.global_shape,
                global_offset=tuple(a + b for a, b in zip(place, local, strict=True)),
                # Boxes of uneven sizes are no grid.
                axis_fragmentations=None,
                # No other data rank has this range; the copy of a tied embedding stays a copy.
                replica_id=(*whole.replica_id[:-1], 0),
            )
        )
    return boxes


def wrap_model(chunks: Sequence[OPTModel], config: Config) -> list[DistributedDataParallel]:
    """Give each chunk its gradient buffers, summed over data ranks in fp32."""
    ddp_config = DistributedDataParallelConfig(
        # bf16 sums over hundreds of micro-batches lose what small gradients add.
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
    )
    # Weights are filled later, from the same source on every data rank: there is nothing to broadcast.
    return [
        # Interleaving already hides the reduction of later chunks behind the first one's compute.
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(wrapped: Sequence[DistributedDataParallel], config: Config) -> ChainedOptimizer:
    """Adam on fp32 master weights sharded over data ranks, with clipping and dynamic loss scaling for
    fp16."""
    optimizer_config, precision = config.optimizer, config.training.precision
    engine_config = EngineOptimizerConfig(
        optimizer="adam",
        lr=optimizer_config.learning_rate,
        min_lr=optimizer_config.min_learning_rate,
        weight_decay=optimizer_config.weight_decay,
        adam_beta1=optimizer_config.adam_beta1,
        adam_beta2=optimizer_config.adam_beta2,
        adam_eps=optimizer_config.adam_eps,
        clip_grad=optimizer_config.clip_grad,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=PRECISIONS[precision],
        initial_loss_scale=optimizer_config.initial_loss_scale,
        min_loss_scale=optimizer_config.min_loss_scale,
        loss_scale_window=optimizer_config.loss_scale_window,
        hysteresis=optimizer_config.loss_scale_hysteresis,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    offer_l2_norm()
    chained = get_megatron_optimizer(
        engine_config,
        list(wrapped),
        # What has one axis, biases and norms, gets a group of its own: that of the multiplier 0 below.
        get_standard_config_overrides(engine_config),
        # `place_in_grid` makes none: a checkpoint gathers nothing on the host.
        use_gloo_process_groups=False,
    )
    assert isinstance(chained, ChainedOptimizer), (
        f"megatron-core built a {type(chained).__name__}, not a chain"
    )
    betas = (optimizer_config.adam_beta1, optimizer_config.adam_beta2)
    for optimizer in chained.chained_optimizers:
        assert type(optimizer) is DistributedOptimizer, f"unexpected optimizer {type(optimizer).__name__}"
        optimizer.optimizer = Adam(optimizer.optimizer.param_groups, betas, optimizer_config.adam_eps)
        # megatron-core leaves this product to its scheduler of rates, which does not run here.
        for group in optimizer.optimizer.param_groups:
            group["weight_decay"] *= group["wd_mult"]
        # megatron-core offers no way to name the class; state and attributes stay as built.
        optimizer.__class__ = ReshardableOptimizer
    connect_schedule(wrapped, chained, config)
    return chained


def scale_gradients(optimizer: ChainedOptimizer, num_targets: int, grad_norm: float, max_norm: float) -> None:
    """Have the coming update divide its gradients, which are sums, by the number of targets, and scale what
    comes out so that its norm, `grad_norm`, is `max_norm` at most; 0 leaves it.

    Adam does it on its way, and leaves gradients as it has used them. megatron-core reads and writes every
    gradient once more for each of the two, and has the host wait for a count that the plan knew.
    """
    # 1e-6 as megatron-core and torch have it: runs of theirs can be compared with ours.
    clipped = min(max_norm / (grad_norm + 1e-6), 1.0) if max_norm > 0.0 else 1.0
    for distributed in optimizer.chained_optimizers:
        # A step may be without any target, and then its gradient is 0.
        distributed.optimizer.gradient_factor = clipped / max(num_targets, 1)


def _sum_gradients(model: list[torch.nn.Module], counted: torch.Tensor | None, **settings: Any) -> None:
    """The schedule's last act: sums over replicas, tensor ranks and copies of the embedding.

    Without the number of targets that was counted, megatron-core divides nothing.
    """
    finalize_model_grads(model, None, **settings)


def connect_schedule(
    wrapped: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer, config: Config
) -> None:
    """Tell megatron-core's pipeline schedules how to scale losses and reduce gradients."""
    # One object for all chunks and every module in them.
    engine_config = wrapped[0].config
    # 1 outside fp16; `model/head.py` asks it too, for gradients it makes in the forward.
    engine_config.grad_scale_func = optimizer.scale_loss
    engine_config.finalize_model_grads_func = _sum_gradients
    # Gradients are reduced once a step, in the last micro-batch.
    engine_config.no_sync_func = (
        [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    )
    # Interleaved, the schedule itself knows when a chunk's last gradient is there.
    if config.parallel.overlap_grad_reduce and len(wrapped) > 1:
        engine_config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]
    if config.parallel.overlap_param_gather and len(wrapped) > 1:
        engine_config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
