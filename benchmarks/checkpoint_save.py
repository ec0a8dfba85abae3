"""How long training stands still for a save, and how long writing and loading take.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_save.py --size opt-6.7b --row-length 4096 --rows 8 \
        --output saves --draw-on-device
    torchrun --nproc-per-node 2 benchmarks/checkpoint_save.py --size opt-125m --row-length 64 --rows 2 \
        --output saves --gathered model.kernel_backend=reference

Random weights; steps on packed documents of synthetic lengths. After some plain steps comes a save in the
background, with steps until it is complete. Then the checkpoint is loaded over other weights, and weights,
fp32 weights and moments must have the digests they had when the save began: a save that is not what was saved
has no business being fast. With --gathered the same saves are taken with megatron-core's own optimizer, which
gathers the state of all data ranks on each.

Seconds, of the rank that took longest: `call`, what the save itself took of training; `lost`, wall time from
the call until the checkpoint was complete, less what the steps taken in it had taken without a save (the
faster of two tries each), so everything a save costs and a little more; `percent_of_100_steps`, what that is
of 100 plain steps. The list of plain steps is rank 0's. One save at a time is on the disk.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_step import benchmark_config, packed_rows, step_rows

from megatron_iml.checkpoint.load import check_share_of_files, load_run
from megatron_iml.checkpoint.record import RunState, read_record
from megatron_iml.checkpoint.staging import Gate
from megatron_iml.checkpoint.store import CheckpointStore
from megatron_iml.config import CheckpointConfig, Config, rows_per_step
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import start_distributed, stop_distributed
from megatron_iml.training.copies import digest
from megatron_iml.training.engine import Engine, build_engine
from megatron_iml.training.optimizer import ReshardableOptimizer
from megatron_iml.training.rows import StepRows
from megatron_iml.training.step import train_step

RATE = 1e-5
WARM_UP, PLAIN, LONGEST = 3, 15, 400
"""Steps before the clock, steps that give the time of a plain one, steps of a save that never ends."""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="opt-125m", help="a name of the OPT family (default: %(default)s)")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=2, help="rows of one step over all ranks")
    parser.add_argument("--output", type=Path, required=True, help="folder for the files; emptied")
    parser.add_argument("--saves", type=int, default=1, help="per way (default: %(default)s)")
    parser.add_argument("--gathered", action="store_true", help="also with megatron-core's own optimizer")
    parser.add_argument("--draw-on-device", action="store_true", help="random weights of the GPU's own")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_args()


def filled_engine(config: Config, draw_on_device: bool) -> Engine:
    """Random weights."""
    # No self-test: nothing is timed here that depends on what the model computes.
    layout = start_distributed(config)
    engine = build_engine(config, layout)
    draw_on = layout.device if draw_on_device else torch.device("cpu")
    initialise(engine.chunks, config.model, 1, layout, draw_on)
    engine.optimizer.reload_model_params()
    return engine


def digests(engine: Engine) -> list[tuple[int, int, int]]:
    """Of this rank's weights, fp32 weights and moments; the same bits have the same."""
    tensors = [parameter.detach() for chunk in engine.chunks for parameter in chunk.parameters()]
    for optimizer in engine.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            for master in group["params"]:
                tensors += [master.detach(), *optimizer.optimizer.state[master].values()]
    return [digest(tensor) for tensor in tensors]


def scramble(engine: Engine) -> None:
    """Make weights and state anything else, so that a load has to fill all of it."""
    # Not zero, which fresh moments are: a load that skips some would pass.
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(0.5)
    engine.optimizer.reload_model_params()
    for optimizer in engine.optimizer.chained_optimizers:
        for state in optimizer.optimizer.state.values():
            for moment in state.values():
                moment.fill_(0.25)


def peak_gb() -> float:
    """Largest resident memory of this process since the last `reset_peak`; pinned memory counts."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def reset_peak() -> None:
    """Begin anew to look for the largest."""
    # proc(5): 5 sets the peak back to what is resident.
    Path("/proc/self/clear_refs").write_text("5")


def tell(text: str) -> None:
    """Say on rank 0 how far it is, for whoever stops it early."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def slowest(seconds: float) -> float:
    """The longest of all ranks' times."""
    everyone = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    return max(everyone)


def timed_step(engine: Engine, rows: StepRows, store: CheckpointStore) -> float:
    """Seconds of one step as the loop takes it; its loss is read, so the device is done."""
    began = time.perf_counter()
    train_step(engine, rows, RATE, before_update=store.before_update)
    return time.perf_counter() - began


def copy_speed(engine: Engine, store: CheckpointStore) -> float | None:
    """GB/s from the device to the host memory of saves, all of this rank's fp32 weights at once."""
    # megatron-core chains a second one for experts only.
    (optimizer,) = engine.optimizer.chained_optimizers
    masters = [param.detach() for group in optimizer.optimizer.param_groups for param in group["params"]]
    masters = [master for master in masters if store.staging.must_copy(master)]
    if not masters:
        return None
    torch.cuda.synchronize()
    began = time.perf_counter()
    store.staging.place(masters)
    # A gate that nobody waits behind: only the copies are timed.
    store.staging.begin(Gate())
    store.staging.settle()
    return sum(master.nbytes for master in masters) / 1e9 / (time.perf_counter() - began)


def save_while_training(
    engine: Engine, store: CheckpointStore, steps: list[StepRows], plain: list[float], number: int
) -> dict[str, Any]:
    """One save, and steps until it is complete; `plain` are the seconds of the same steps without one."""
    # Right after a reset the peak is what is resident.
    reset_peak()
    before = peak_gb()
    # Ranks start together, or the first would count its waiting for the last as part of the save.
    dist.barrier()
    began = time.perf_counter()
    said = store.save(engine, RunState(number, 0, "", ""), {})
    call = time.perf_counter() - began
    taken: list[float] = []
    # Nothing is said until the save is complete, or refused.
    while not said and len(taken) < LONGEST:
        taken.append(timed_step(engine, steps[len(taken) % len(steps)], store))
        if len(taken) == 3:
            tell(f"the call took {call:.2f} s, the steps after it {[round(seconds, 3) for seconds in taken]}")
        said = store.poll()
    whole = time.perf_counter() - began
    assert said and said[0].startswith("  saved"), said
    # Steps slowed by the writing count here, and so does the wait before the first update. Step by step: some
    # rows take longer than others.
    lost = slowest(whole - sum(plain[index % len(plain)] for index in range(len(taken))))
    return {
        "call_seconds": slowest(call),
        "first_step_seconds": slowest(taken[0]),
        "step_seconds_during": slowest(statistics.median(taken)),
        "steps_during": len(taken),
        "lost_seconds": lost,
        "percent_of_100_steps": lost / slowest(statistics.fmean(plain)),
        "whole_seconds": whole,
        "added_gb": peak_gb() - before,
        "said": said[0].strip(),
    }


def load_back(engine: Engine, folder: Path, expected: list[tuple[int, int, int]]) -> dict[str, float]:
    """Verify and load over other values; seconds of both."""
    scramble(engine)
    # From the page cache, most of it: the files have just been written.
    record = read_record(folder)
    dist.barrier()
    began = time.perf_counter()
    check_share_of_files(folder, record, weights_only=False)
    verified = time.perf_counter()
    tell(f"verified in {verified - began:.1f} s")
    load_run(folder, engine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    loaded = time.perf_counter()
    assert digests(engine) == expected, f"rank {dist.get_rank()}: the state loaded is not the one saved"
    return {"verify_seconds": slowest(verified - began), "load_seconds": slowest(loaded - verified)}


def measure(engine: Engine, steps: list[StepRows], arguments: argparse.Namespace, way: str) -> dict[str, Any]:
    """Plain steps, a save among steps, a load; as often as asked."""
    store = CheckpointStore(arguments.output / way, CheckpointConfig(keep_last=1))
    began = time.perf_counter()
    store.reserve(engine)
    reserved = slowest(time.perf_counter() - began)
    speed = copy_speed(engine, store)
    # After all that is done once: the first steps compile, and find their memory.
    for rows in steps[:WARM_UP]:
        timed_step(engine, rows, store)
    steps = steps[WARM_UP:]
    # Twice, and the faster of the two: a plain step that met something else would hide what a save costs.
    passes = [[timed_step(engine, rows, store) for rows in steps] for _ in range(2)]
    plain = [min(times) for times in zip(*passes, strict=True)]
    tell(f"{way}: reserving {store.staging.size / 1e9:.1f} GB took {reserved:.1f} s, copies {speed} GB/s")
    tell(f"{way}: a plain step takes {statistics.fmean(plain):.3f} s")
    runs = []
    for number in range(1, arguments.saves + 1):
        # Before the call: what is saved is the state at its beginning, whatever the steps beside it do.
        expected = digests(engine)
        run = save_while_training(engine, store, steps, plain, number)
        tell(f"{way}: {json.dumps(run)}")
        folder = store.directory / f"iter_{number:07d}"
        size = read_record(folder).total_bytes / 1e9
        runs.append(run | load_back(engine, folder, expected))
        dist.barrier()
        # Two checkpoints of a large model are more than many disks hold.
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    numbers = [name for name in runs[0] if name != "said"]
    return {
        "way": way,
        "gigabytes": size,
        "reserve_seconds": reserved,
        "reserved_gb": store.staging.size / 1e9,
        "copy_gb_per_second": speed,
        "plain_step_seconds": slowest(statistics.fmean(plain)),
        "plain_step_seconds_all": plain,
        **{name: statistics.median(run[name] for run in runs) for name in numbers},
        "call_seconds_all": [run["call_seconds"] for run in runs],
        "said": runs[-1]["said"],
    }


def main() -> None:
    """Measure one way or both; rank 0 prints a line of JSON for each."""
    arguments = parse_arguments()
    config = benchmark_config(arguments, arguments.overrides)
    engine = filled_engine(config, arguments.draw_on_device)
    # Before any rank looks for room there.
    if dist.get_rank() == 0:
        shutil.rmtree(arguments.output, ignore_errors=True)
    dist.barrier()
    per_step = rows_per_step(config)
    rows = packed_rows(config, None, (WARM_UP + PLAIN) * per_step)
    steps = [step_rows(rows[i : i + per_step], engine) for i in range(0, len(rows), per_step)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    common = {
        "size": arguments.size,
        "row_length": arguments.row_length,
        "rows": arguments.rows,
        "overrides": arguments.overrides,
        "world_size": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit.stdout.strip(),
    }
    ways = {"ours": ReshardableOptimizer}
    # megatron-core's own class, which ours is made from.
    if arguments.gathered:
        ways["gathered"] = ReshardableOptimizer.__base__
    for way, kind in ways.items():
        # As `build_optimizer` does it: state and attributes are the same.
        for optimizer in engine.optimizer.chained_optimizers:
            optimizer.__class__ = kind
        row = measure(engine, steps, arguments, way)
        if dist.get_rank() == 0:
            print(json.dumps({**common, **row}), flush=True)
    stop_distributed()


if __name__ == "__main__":
    main()
