"""Time of whole training steps of OPT on packed documents of real or synthetic lengths.

    python benchmarks/train_step.py --size opt-1.3b --row-length 16384 --rows 2 --output results
    torchrun --nproc-per-node 4 benchmarks/train_step.py --size opt-6.7b --row-length 4096 --rows 16 \
        parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2

Random weights and tokens; documents drawn from --lengths (an .npz with prompt_len and target_len) or from
lognormals near the real mix (186 tokens, 7.3 % of them targets; the mix has 180 and 8.6 %). Before a number
is printed the start-up self-test must pass on the very layout and shapes that are timed, and the loss of the
first step must be that of an untrained model. Reported: the median of the timed steps with the fastest and
the slowest, real tokens (never padding) per second, useful FLOPs per GPU (docs/decisions.md), peak memory,
and with --profile where the time of one step goes.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from megatron_iml.config import Config, load_config, rows_per_step
from megatron_iml.data.rows.assemble import Piece, Row, assemble_row
from megatron_iml.model.initialise import initialise
from megatron_iml.parallel.groups import start_distributed, stop_distributed
from megatron_iml.parallel.rows import deal_rows
from megatron_iml.training.engine import Engine, build_engine
from megatron_iml.training.flops import row_flops
from megatron_iml.training.rows import StepRows
from megatron_iml.training.self_test import run_self_test
from megatron_iml.training.step import train_step

# Tokens of a document of 2,048 positions: the last one is predicted, never read.
LONGEST = 2049


def benchmark_config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """Random weights of --size, and a step of --rows rows of --row-length positions."""
    named = [
        f"model.size={arguments.size}",
        "model.initialisation=random",
        f"data.row_length={arguments.row_length}",
        f"training.global_batch_positions={arguments.rows * arguments.row_length}",
    ]
    return load_config(None, [*named, *overrides])


def document_lengths(path: Path | None, seed: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and target tokens of many documents, at most `longest` together."""
    rng = np.random.default_rng(seed)
    if path is not None:
        stored = np.load(path)
        order = rng.permutation(len(stored["prompt_len"]))
        prompts, targets = stored["prompt_len"][order], stored["target_len"][order]
    else:
        # Means of 172 and 14 tokens before the clipping below.
        prompts = rng.lognormal(4.7, 0.95, 200_000).astype(np.int64) + 1
        targets = rng.lognormal(1.6, 1.4, 200_000).astype(np.int64) + 1
    # At least one source token stays, as in training.
    targets = np.clip(targets, 1, longest - 1)
    return np.clip(prompts, 1, longest - targets), targets


def packed_rows(config: Config, lengths: Path | None, count: int) -> list[Row]:
    """Rows filled in order: what does not fit starts the next row, cut to the room that is left in this
    one."""
    # A row of n slots holds a document of n + 1 tokens.
    # Fixed seeds: every layout and every commit is timed on the same rows.
    prompts, targets = document_lengths(lengths, 7, min(LONGEST, config.data.row_length + 1))
    rng = np.random.default_rng(1)
    rows: list[Row] = []
    pieces: list[Piece] = []
    room, row_length = config.data.row_length, config.data.row_length
    for prompt, target in zip(prompts.tolist(), targets.tolist(), strict=True):
        # From the left of the prompt, as a plan cuts; rows are full, for packing is not what is timed.
        cut = max(prompt + target - 1 - room, 0)
        if prompt - cut < 1:
            rows.append(assemble_row(pieces, row_length, len(rows)))
            pieces, room, cut = [], row_length, 0
            if len(rows) == count:
                return rows
        size = prompt - cut + target
        # From 4: the first ids are special tokens. Random ids touch more of the embedding than text would.
        tokens = rng.integers(4, config.model.vocab_size, size).astype(np.int32)
        pieces.append(Piece(tokens, prompt - cut))
        room -= size - 1
    raise ValueError(
        f"{len(prompts)} documents fill {len(rows)} rows of {row_length}, {count} were asked for"
    )


def step_rows(rows: list[Row], engine: Engine) -> StepRows:
    """This rank's rows of one step, dealt as in training."""
    config, layout = engine.config, engine.layout
    # Visible pairs, the attention's useful work.
    pairs = [int((row.layout.end_T - np.arange(len(row.layout.end_T))).sum()) for row in rows]
    costs = [
        row_flops(config.model, row.layout.num_real, row.layout.num_targets, pair)
        for row, pair in zip(rows, pairs, strict=True)
    ]
    own = deal_rows(costs, layout.data_size)[layout.data_rank]
    # Both ends read whole rows: tokens at the first, targets at the last.
    edge = layout.is_first_stage or layout.is_last_stage
    return StepRows(
        # Middle stages of a run read no tokens.
        rows=[rows[i] if edge else rows[i].layout for i in own],
        num_rows=len(rows),
        num_targets=sum(row.layout.num_targets for row in rows),
        num_real=sum(row.layout.num_real for row in rows),
        # Of no plan: this is only told, and the CRC below only compared among ranks.
        num_documents=0,
        useful_flops=sum(costs),
        documents_crc=0,
    )


def time_steps(engine: Engine, steps: list[StepRows], warm_up: int) -> tuple[list[float], list[float]]:
    """Seconds of each step after the first few, and every step's loss; it is read, so the device is done."""
    seconds, losses = [], []
    # The first steps compile kernels and fill the allocator's pools: `warm_up` of them do not count.
    for index, rows in enumerate(steps):
        began = time.perf_counter()
        result = train_step(engine, rows, 1e-6)
        seconds.append(time.perf_counter() - began)
        losses.append(result.loss)
        # Weights that were not filled, or a head that sees other rows, would not lose just this.
        if index == 0:
            expected = math.log(engine.config.model.vocab_size)
            if abs(result.loss - expected) > 0.5:
                raise RuntimeError(
                    f"an untrained model loses ln V = {expected:.2f}, this one {result.loss:.2f}"
                )
    return seconds[warm_up:], losses


def profile_step(engine: Engine, rows: StepRows) -> str:
    """The kernels of one step, longest total first."""
    # One step, after those that are timed: a profiler slows what it watches.
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        train_step(engine, rows, 1e-6)
    busiest = f"self_{engine.layout.device.type}_time_total"
    return profiler.key_averages().table(sort_by=busiest, row_limit=40, max_name_column_width=70)


def main() -> None:
    """Time one configuration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="opt-1.3b")
    parser.add_argument("--row-length", type=int, default=16384)
    parser.add_argument("--rows", type=int, default=2, help="rows of one step over all ranks")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lengths", type=Path, help=".npz with prompt_len and target_len")
    parser.add_argument("--steps", type=int, default=8, help="with those that warm up")
    parser.add_argument("--warm-up", type=int, default=3, help="steps that are not counted")
    parser.add_argument(
        "--draw-on-device", action="store_true", help="random weights of the GPU's own, far sooner there"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for train_step.jsonl and the profile")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_args()
    places = ("hidden", "attention", "embedding")
    dropout = [f"model.{place}_dropout={arguments.dropout}" for place in places]
    config = benchmark_config(arguments, [*dropout, *arguments.overrides])
    layout = start_distributed(config)
    engine = build_engine(config, layout)
    draw_on = layout.device if arguments.draw_on_device else torch.device("cpu")
    initialise(engine.chunks, config.model, 1, layout, draw_on)
    # The weights were filled after the optimizer had made its fp32 masters.
    engine.optimizer.reload_model_params()
    # Before the clock: a layout that mixes documents has no speed.
    run_self_test(engine)
    # Every step has rows of its own: no cache of bounds or tokens can help.
    rows = packed_rows(config, arguments.lengths, arguments.steps * rows_per_step(config))
    per_step = rows_per_step(config)
    steps = [step_rows(rows[i : i + per_step], engine) for i in range(0, len(rows), per_step)]
    seconds, losses = time_steps(engine, steps, arguments.warm_up)
    table = profile_step(engine, steps[0]) if arguments.profile else ""
    # One rank speaks; times of all are alike, since a step ends in a collective.
    if layout.reports:
        report(arguments, engine, steps[arguments.warm_up :], seconds, losses, table)
    stop_distributed()


def report(
    arguments: argparse.Namespace,
    engine: Engine,
    steps: list[StepRows],
    seconds: list[float],
    losses: list[float],
    table: str,
) -> None:
    """Print the result, and append it to train_step.jsonl."""
    rates = [rows.num_real / second for rows, second in zip(steps, seconds, strict=True)]
    tflops = [rows.useful_flops / second / 1e12 for rows, second in zip(steps, seconds, strict=True)]
    world, on_gpu = engine.layout.world_size, engine.layout.device.type == "cuda"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    row = {
        "size": arguments.size,
        "layers": engine.config.model.num_layers,
        "row_length": arguments.row_length,
        "rows": arguments.rows,
        "dropout": arguments.dropout,
        "lengths": "real" if arguments.lengths else "synthetic",
        "overrides": arguments.overrides,
        "ranks": world,
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "milliseconds": [round(1000 * f(seconds), 1) for f in (statistics.median, min, max)],
        # The median of rates and not tokens over the median time: steps differ in their padding.
        "real_tokens_per_second": round(statistics.median(rates)),
        "useful_tflops_per_gpu": round(statistics.median(tflops) / world, 1),
        "losses": [round(loss, 5) for loss in losses],
        # Of the reporting rank, self-test and warm-up included; not what torch reserves beyond it.
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if on_gpu else None,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": git.stdout.strip(),
        "parallel": dataclasses.asdict(engine.config.parallel),
    }
    print(json.dumps(row))
    print(table)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / "train_step.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if table:
            (arguments.output / f"profile_{arguments.size}_{arguments.dropout}.txt").write_text(table)


if __name__ == "__main__":
    main()
