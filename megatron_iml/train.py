"""Trains an OPT on a packed corpus: `python -m megatron_iml.train --config run.yaml section.field=value ...`.

One process per GPU, started by torchrun or SLURM; without a launcher, one process. Everything the run needs
is in the configuration (megatron_iml/config/schema.py); its resolved copy, the metrics and the checkpoints go
to training.output_directory, from which the same command resumes.
"""

import os
import sys
from collections.abc import Sequence

from megatron_iml.command import at_least_one, config_parser, quiet_engine, refuse
from megatron_iml.config import Config, check_config, load_config
from megatron_iml.config.explain import explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 the last checkpoint could not be written, 2 a
    mistake in the input, 75 stopped by a signal.

    Anything else is an exception with its traceback, on the rank that met it.
    """
    parser = config_parser(__doc__, "python -m megatron_iml.train")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--explain", action="store_true", help="print the layout and train nothing")
    instead.add_argument("--dry-run", action="store_true", help="build it without memory and check it")
    parser.add_argument("--world-size", type=at_least_one, help="for the two above; else WORLD_SIZE or 1")
    parsed = parser.parse_args(arguments)
    if parsed.world_size is not None and not (parsed.explain or parsed.dry_run):
        parser.error("--world-size goes with --explain or --dry-run; a launcher says how many ranks train")
    world_size = parsed.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    # On every rank, before any of them can speak to another.
    try:
        config = load_config(parsed.config, parsed.overrides)
        check_config(config, world_size)
    except (ValueError, OSError) as error:
        return refuse(error)
    if parsed.explain:
        print(explain(config, world_size))
        return 0
    quiet_engine()
    return dry_run(config, world_size) if parsed.dry_run else run(config)


def dry_run(config: Config, world_size: int) -> int:
    """Build representative ranks without memory; 0 if everything adds up, 2 if the data does not fit."""
    # Before torch is there: the GPUs of the machine, if it has any, have no part in this.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_iml.training.dry_run import (
        account_of,
        check_accounts,
        first_row_targets,
        representative_ranks,
    )

    try:
        num_targets, origin = first_row_targets(config)
    except (ValueError, OSError) as error:
        return refuse(error)
    ranks = representative_ranks(config, world_size)
    accounts = [account_of(config, rank, world_size, num_targets) for rank in ranks]
    for line in check_accounts(config, world_size, accounts):
        print(line)
    print(f"targets of the first row: {num_targets}, {origin}")
    return 0


def run(config: Config) -> int:
    """Train with a checked configuration."""
    # torch and megatron-core take seconds to import: not before the arguments are known to be right.
    from megatron_iml.checkpoint.background import SaveFailed
    from megatron_iml.parallel.groups import start_distributed, stop_distributed
    from megatron_iml.training.agree import AgreedMistake
    from megatron_iml.training.loop import train
    from megatron_iml.training.prepare import prepare
    from megatron_iml.training.signals import EXIT_REQUEUE

    try:
        layout = start_distributed(config)
    except ValueError as mistake:
        return refuse(mistake)
    try:
        prepared = prepare(config, layout)
    except AgreedMistake as mistake:
        stop_distributed()
        return refuse(mistake)
    try:
        finished = train(prepared)
    except SaveFailed as failure:
        # Known to every rank, so that all leave together.
        stop_distributed()
        return refuse(failure, status=1)
    # Not in a `finally`: one rank that fails alone would wait here for the others, who wait in a collective,
    # and its traceback would not be seen. It dies instead, and the launcher ends the rest.
    stop_distributed()
    return 0 if finished else EXIT_REQUEUE


# megatron-core's background saves start processes: without this guard they would train too.
if __name__ == "__main__":
    sys.exit(main())
