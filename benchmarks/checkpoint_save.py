"""How long training stands still for a save, and what memory it takes: ours beside megatron-core's gathering.

Example: torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint_save.py --size opt-125m --output saves

The model has random weights and moments that are not zero. Before anything is timed, a save is loaded back
and its master weights compared bit for bit. One line of JSON a rank and way, with the median of the saves.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_iml.checkpoint.load import load_run
from megatron_iml.checkpoint.record import RunState, damage, read_record
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, load_config
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import start_distributed, stop_distributed
from megatron_iml.training.engine import Engine, build_engine
from megatron_iml.training.optimizer import ReshardableOptimizer

WAYS = {"ours": ReshardableOptimizer, "gathered": ReshardableOptimizer.__base__}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="opt-125m", help="a name of the OPT family (default: %(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel size (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files; emptied")
    parser.add_argument("--repeats", type=int, default=3, help="saves per way (default: %(default)s)")
    return parser.parse_args()


def filled_engine(config: Config) -> Engine:
    """Random weights, and moments that differ from element to element."""
    layout = start_distributed(config)
    engine = build_engine(config, layout)
    initialise(engine.chunks, config.model, config.training.seed, layout)
    engine.optimizer.reload_model_params()
    for optimizer in engine.optimizer.chained_optimizers:
        # Makes the moments.
        optimizer.optimizer.state_dict()
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].normal_()
            state["exp_avg_sq"].uniform_()
    return engine


def masters(engine: Engine) -> list[torch.Tensor]:
    """This rank's fp32 weights."""
    (optimizer,) = engine.optimizer.chained_optimizers
    return [param.detach() for group in optimizer.optimizer.param_groups for param in group["params"]]


def peak_gb() -> float:
    """Largest resident memory of this process since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def reset_peak() -> None:
    """Begin anew to look for the largest."""
    Path("/proc/self/clear_refs").write_text("5")


def save_once(engine: Engine, folder: Path, step: int) -> dict[str, float]:
    """One save in the background; a stand-still, the time until it is complete, and memory."""
    store = CheckpointStore(folder, CheckpointConfig(keep_last=1))
    reset_peak()
    before = peak_gb()
    dist.barrier()
    began = time.perf_counter()
    store.save(engine, RunState(step, 0, "", ""), {})
    waited = time.perf_counter() - began
    peak = peak_gb()
    store.wait()
    whole = time.perf_counter() - began
    return {"waited_seconds": waited, "whole_seconds": whole, "added_gb": peak - before, "before_gb": before}


def check(engine: Engine, folder: Path) -> None:
    """A save that is not what was saved has no business being fast."""
    save_once(engine, folder, 1)
    newest = folder / "iter_0000001"
    saved = [tensor.clone() for tensor in masters(engine)]
    for tensor in masters(engine):
        tensor.zero_()
    load_run(newest, engine)
    assert all(torch.equal(a, b) for a, b in zip(masters(engine), saved, strict=True)), "not what was saved"
    assert damage(newest, read_record(newest).files) == [], "not what was written"


def measure(engine: Engine, arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """Save several times."""
    for optimizer in engine.optimizer.chained_optimizers:
        optimizer.__class__ = WAYS[way]
    runs = [save_once(engine, arguments.output / way, 10 + number) for number in range(arguments.repeats)]
    (folder,) = (arguments.output / way).glob("iter_???????")
    return {
        "way": way,
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "size": arguments.size,
        "tensor": arguments.tensor,
        "gigabytes": read_record(folder).total_bytes / 1e9,
        **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "waited_seconds_all": [run["waited_seconds"] for run in runs],
    }


def main() -> None:
    """Check, then measure both ways."""
    arguments = parse_arguments()
    config = load_config(
        None,
        [
            f"model.size={arguments.size}",
            "model.initialisation=random",
            "model.kernel_backend=reference",
            f"parallel.tensor_model_parallel_size={arguments.tensor}",
        ],
    )
    config = replace(config, training=replace(config.training, precision="bf16"))
    engine = filled_engine(config)
    if dist.get_rank() == 0:
        shutil.rmtree(arguments.output, ignore_errors=True)
    dist.barrier()
    check(engine, arguments.output / "check")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for way in WAYS:
        row = measure(engine, arguments, way)
        print(json.dumps({**row, "device": device, "commit": commit.stdout.strip()}), flush=True)
    stop_distributed()


if __name__ == "__main__":
    main()
