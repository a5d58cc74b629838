"""A command of which a process is killed before a step of the training: another process at each start of torchrun."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from funclora._apps.train.step import Steps
from funclora.cli import main

# For each start, which process dies, and before which step.
DEATHS = ((1, 3), (0, 5))

if __name__ == "__main__":
    torch.set_num_threads(1)
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(DEATHS) and int(os.environ["RANK"]) == DEATHS[start][0]:
        step = Steps.__call__

        def dying(self: Steps, k: int, *rest: Any) -> Any:
            if k == DEATHS[start][1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, k, *rest)

        Steps.__call__ = dying  # type: ignore[method-assign, assignment]
    sys.argv[0] = "funclora"
    main()
