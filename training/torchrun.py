"""`python -m idefics2_fast.training.torchrun ...`: torchrun, with the exit code of the run.

Takes torchrun's arguments:

    python -m idefics2_fast.training.torchrun --nproc-per-node 8 -m idefics2_fast.training instruct ...

torchrun itself ends with 1 whatever code its processes end with, and with 1 when it was told to end.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from idefics2_fast.training.guard import REQUEUE


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes that torchrun's arguments name, and waits for them.

    Returns:
        0, or the exit code of the process that ended first with another; after a signal the code that
        the processes end with, 75 or 130: each was signalled and given torchrun's time to save.
    """
    try:
        run.main(sys.argv[1:] if argv is None else list(argv))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # killed: as a shell says it
    except SignalException as error:
        return REQUEUE if error.sigval == signal.SIGTERM else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
