"""A run saved under one layout goes on under others: how long loading takes, and whether the losses agree.

    torchrun --nproc-per-node 2 benchmarks/resharding.py --size opt-1.3b --output saves --draw-on-device
    torchrun --nproc-per-node 4 benchmarks/resharding.py --size opt-6.7b --output saves --draw-on-device

Three steps with dropout from random weights, a save, three more. Then each layout loads it over other weights
and takes those three steps again. The layout that saved must give the same losses bit for bit, any other to
what rounding explains: bf16 rounds to 2^-9, and a loss is a mean over a thousand targets and more, whose
errors cancel. Rank 0 prints a line of JSON for each layout.
"""

import argparse
import gc
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from train_step import benchmark_config, packed_rows, step_rows

from megatron_iml.checkpoint.load import check_share_of_files, load_run
from megatron_iml.checkpoint.record import RunState, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, ParallelConfig, rows_per_step
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import leave_grid, start_distributed, stop_distributed
from megatron_iml.training.engine import Engine, build_engine
from megatron_iml.training.step import train_step

TOLERANCE = 5e-3
RATE = 1e-5
STEPS = 3


def layout(tensor: int, pipeline: int, virtual: int | None = None) -> ParallelConfig:
    """Sequence parallelism goes with tensor parallelism."""
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=tensor > 1,
    )


LAYOUTS = {
    2: {"TP2": layout(2, 1), "PP2": layout(1, 2), "PP2 interleaved": layout(1, 2, 2), "DP2": layout(1, 1)},
    4: {"TP2 x DP2": layout(2, 1), "TP4": layout(4, 1), "PP2 x TP2": layout(2, 2), "DP4": layout(1, 1)},
}
"""By ranks; the first one saves."""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="opt-1.3b", help="a name of the OPT family (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="rows of one step over all ranks")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint; emptied")
    parser.add_argument("--draw-on-device", action="store_true", help="random weights of the GPU's own")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_args()


def engine_of(config: Config, seed: int, draw_on_device: bool) -> Engine:
    """An engine with random weights, which depend on the seed alone."""
    place = start_distributed(config)
    engine = build_engine(config, place)
    draw_on = place.device if draw_on_device else torch.device("cpu")
    initialise(engine.chunks, config.model, seed, place, draw_on)
    engine.optimizer.reload_model_params()
    return engine


def take_steps(engine: Engine, steps: range) -> list[float]:
    """The losses of these steps, the same rows whatever the layout."""
    per_step = rows_per_step(engine.config)
    # Drawn anew each time: by number, so that every layout gets the same.
    rows = packed_rows(engine.config, None, steps.stop * per_step)
    return [
        train_step(engine, step_rows(rows[step * per_step : (step + 1) * per_step], engine), RATE).loss
        for step in steps
    ]


def load(engine: Engine, folder: Path) -> float:
    """Verify and load; seconds."""
    # From the last rank's beginning to the last one's end: none goes on before.
    dist.barrier()
    began = time.perf_counter()
    check_share_of_files(folder, read_record(folder), weights_only=False)
    load_run(folder, engine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - began


def leave() -> None:
    """Give back what the layout before has held; the caller has let go of its engine."""
    leave_grid()
    # Hooks, buffers and the optimizer refer to one another: an engine stays whole until it is collected.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> int:
    """Save under the first layout, go on under each; 1 if losses disagree."""
    arguments = parse_arguments()
    # Row length and rows are the same under every layout, so the steps are.
    config = benchmark_config(arguments, arguments.overrides)
    # Joins the world under some layout, to learn how many ranks there are.
    start_distributed(config)
    leave_grid()
    layouts = LAYOUTS[dist.get_world_size()]
    first = next(iter(layouts))
    if dist.get_rank() == 0:
        shutil.rmtree(arguments.output, ignore_errors=True)
    dist.barrier()
    engine = engine_of(replace(config, parallel=layouts[first]), 1, arguments.draw_on_device)
    take_steps(engine, range(STEPS))
    # Waited for: the steps that follow must not be slowed, and the files must be there.
    store = CheckpointStore(arguments.output, CheckpointConfig(asynchronous=False))
    store.save(engine, RunState(STEPS, 0, "", ""), {})
    expected = take_steps(engine, range(STEPS, 2 * STEPS))
    problems = 0
    folder = arguments.output / f"iter_{STEPS:07d}"
    for name, parallel in layouts.items():
        # Before the next one is built: two engines may not fit the GPU.
        del engine
        leave()
        # Another seed: what the load left out would show in the losses.
        engine = engine_of(replace(config, parallel=parallel), 2, arguments.draw_on_device)
        seconds = load(engine, folder)
        losses = take_steps(engine, range(STEPS, 2 * STEPS))
        distance = max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True))
        agrees = distance == 0 if name == first else distance < TOLERANCE
        problems += not agrees
        row = {
            "size": arguments.size,
            "saved_under": first,
            "loaded_under": name,
            "gigabytes": read_record(folder).total_bytes / 1e9,
            "verify_and_load_seconds": round(seconds, 2),
            "losses": losses,
            "expected": expected,
            "distance": distance,
            "agrees": agrees,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
    del engine
    stop_distributed()
    return min(problems, 1)


if __name__ == "__main__":
    sys.exit(main())
