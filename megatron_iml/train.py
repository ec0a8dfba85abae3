"""Trains an OPT on a packed corpus: `python -m megatron_iml.train --config run.yaml section.field=value ...`.

One process per GPU, started by torchrun or SLURM; without a launcher, one process. Everything the run needs
is in the configuration (megatron_iml/config/schema.py); its resolved copy, the metrics and the checkpoints go
to training.output_directory, from which the same command resumes.
"""

import os
import sys
from collections.abc import Sequence

from megatron_iml.command import config_parser, refuse
from megatron_iml.config import Config, check_config, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 a mistake in the input, 75 stopped by a signal.

    Anything else is an exception with its traceback, on the rank that met it.
    """
    parsed = config_parser(__doc__, "python -m megatron_iml.train").parse_args(arguments)
    try:
        config = load_config(parsed.config, parsed.overrides)
        check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    except (ValueError, FileNotFoundError) as error:
        return refuse(error)
    return run(config)


def run(config: Config) -> int:
    """Train with a checked configuration."""
    # torch and megatron-core take seconds to import: not before the arguments are known to be right.
    from megatron_iml.parallel.groups import start_distributed, stop_distributed
    from megatron_iml.training.agree import AgreedMistake
    from megatron_iml.training.loop import train
    from megatron_iml.training.prepare import prepare
    from megatron_iml.training.signals import EXIT_REQUEUE

    try:
        layout = start_distributed(config)
    except ValueError as mistake:
        return _refuse(mistake)
    try:
        prepared = prepare(config, layout)
    except AgreedMistake as mistake:
        stop_distributed()
        return refuse(mistake)
    finished = train(prepared)
    # Not in a `finally`: one rank that fails alone would wait here for the others, who wait in a collective,
    # and its traceback would not be seen. It dies instead, and the launcher ends the rest.
    stop_distributed()
    return 0 if finished else EXIT_REQUEUE


# megatron-core's background saves start processes: without this guard they would train too.
if __name__ == "__main__":
    sys.exit(main())
