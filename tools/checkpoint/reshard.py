"""Say whether a native checkpoint loads under a layout, or write it in another precision or weights only.

Examples:
  python tools/checkpoint/reshard.py check run/checkpoints/iter_0004000 --world-size 8 --tensor 4 --pipeline 2
  python tools/checkpoint/reshard.py write run/checkpoints/iter_0004000 --output fp32/iter_0004000 \\
    --precision fp32
  python tools/checkpoint/reshard.py write run/checkpoints/iter_0004000 --output weights --weights-only

A checkpoint holds whole tensors: another tensor, pipeline, interleaved or data parallel size reads the same
files, and there is nothing to rewrite. To go on from it, name the new sizes in the run's configuration.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_iml.command import at_least_one, command_parser, run_command


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; nothing heavy is imported before it is parsed."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether a layout can load it, and what each rank reads")
    check.add_argument("checkpoint", type=Path, help="iter_XXXXXXX")
    check.add_argument("--world-size", type=at_least_one, required=True, help="ranks")
    check.add_argument(
        "--tensor", type=at_least_one, default=1, help="tensor parallel size (default: %(default)s)"
    )
    check.add_argument(
        "--pipeline", type=at_least_one, default=1, help="pipeline stages (default: %(default)s)"
    )
    check.add_argument(
        "--chunks", type=at_least_one, help="model chunks per stage, for an interleaved pipeline"
    )
    write = commands.add_parser("write", help="another precision, or the weights alone")
    write.add_argument("checkpoint", type=Path, help="iter_XXXXXXX")
    write.add_argument("--output", type=Path, required=True, help="folder to make; must not exist")
    write.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: as it is")
    write.add_argument("--weights-only", action="store_true", help="leave the optimizer state out")
    return parser.parse_args(arguments)


def check_target(arguments: argparse.Namespace) -> None:
    """Verify every file and the layout's divisions; print what a rank would read."""
    # Imported late: `--help` answers without torch.
    from dataclasses import replace

    from megatron_iml.checkpoint.record import check_files, read_record
    from megatron_iml.config import Config, ParallelConfig, check_layout, parameter_count
    from megatron_iml.config.convert import convert

    record = read_record(arguments.checkpoint)
    # As the run's own file is read: a record of another version's fields is refused by name.
    config: Config = convert(record.config, Config, "")
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tensor,
        pipeline_model_parallel_size=arguments.pipeline,
        virtual_pipeline_model_parallel_size=arguments.chunks,
    )
    # Before the files: a layout that does not divide is found at once, damage after minutes.
    check_layout(replace(config, parallel=parallel), arguments.world_size)
    check_files(arguments.checkpoint, record.files)
    # Divides without a rest, as `check_layout` has found.
    shards = arguments.tensor * arguments.pipeline
    data = arguments.world_size // shards
    parameters = parameter_count(config.model)
    # A master weight and two moments in fp32, each on one rank; weights are on every data rank.
    state = (
        f"{12 * parameters / arguments.world_size / 1e9:.3f} GB of optimizer state"
        if record.has_optimizer
        else "no optimizer state: a start (checkpoint.initial_weights), not a run to go on with"
    )
    print(
        f"loads: tensor {arguments.tensor} x pipeline {arguments.pipeline} x data {data}; a rank reads about "
        f"{bytes_of_a_weight(config.training.precision) * parameters / shards / 1e9:.3f} GB of weights and "
        f"{state}"
    )


def bytes_of_a_weight(precision: str) -> int:
    """Bytes of a weight."""
    return 4 if precision == "fp32" else 2


def write_anew(arguments: argparse.Namespace) -> None:
    """Write with a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from megatron_iml.checkpoint.record import read_record
    from megatron_iml.checkpoint.rewrite import rewrite

    # It would write a copy, and who asks for that hopes for another layout.
    if arguments.precision is None and not arguments.weights_only:
        raise ValueError(
            "write: got neither --precision nor --weights-only; allowed: one of them or both; for another "
            "layout nothing has to be written (see check)"
        )
    total = read_record(arguments.checkpoint).total_bytes
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # The bar on one stream, the result on the other: a script reads the latter.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        record = rewrite(
            arguments.checkpoint,
            arguments.output,
            arguments.precision,
            arguments.weights_only,
            lambda num_bytes: progress.advance(task, num_bytes),
        )
    print(f"{arguments.output}: {record.total_bytes:,} bytes in {len(record.files)} files")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 and one line for the user's mistakes."""
    parsed = parse_arguments(arguments)
    command = {"check": check_target, "write": write_anew}[parsed.command]
    return run_command(lambda: command(parsed))


if __name__ == "__main__":
    sys.exit(main())
