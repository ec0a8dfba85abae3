"""torchrun without its traceback where the ranks have said what there is to say; torchrun's own options.

    python -m megatron_iml.launch --standalone --nproc-per-node 2 -m megatron_iml.train --config train.yaml

A user's mistake (status 2) and a run that saved and left (75) end with that status and no further word. Of
every other failure torchrun tells which rank failed and how.
"""

import logging
import sys
from collections.abc import Sequence

from megatron_iml.command import MISTAKE
from megatron_iml.training.signals import EXIT_REQUEUE

SAID = (MISTAKE, EXIT_REQUEUE)
"""Statuses whose reason the ranks have printed, or that have none."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks and return 0 or their status; `ChildFailedError` for a failure that is no mistake."""
    # Here, so that importing this module takes no seconds.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Its lines "failed (exitcode: 2)" and "Sending process ... SIGTERM": the error below has all that counts.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        torchrun(arguments)
    except ChildFailedError as failure:
        # The first: it made torchrun end the others, whose statuses tell of that alone.
        _, first = failure.get_first_failure()
        if first.exitcode not in SAID:
            raise
        return first.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
