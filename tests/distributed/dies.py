"""A command of which a process is killed in the middle of a step: another process at each start of torchrun."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from funclora._apps.sweep.search import Search
from funclora._apps.train.step import Steps
from funclora.cli import main

# For each start, which process dies, and in which of its steps since then. Two steps of a search measure its memory.
DEATHS = {"train": ((1, 4), (0, 4)), "sweep": ((1, 5), (0, 4))}
STEPS: dict[str, tuple[type, str]] = {"train": (Steps, "__call__"), "sweep": (Search, "_stepped")}


def dies_in(owner: type, name: str, last: int) -> None:
    """Let this process be killed in that call of a method."""
    method, calls = getattr(owner, name), iter(range(1, last + 1))

    def dying(*args: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args)

    setattr(owner, name, dying)


if __name__ == "__main__":
    torch.set_num_threads(1)
    start, command = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), sys.argv[1]
    if start < len(DEATHS[command]):
        rank, last = DEATHS[command][start]
        if int(os.environ["RANK"]) == rank:
            dies_in(*STEPS[command], last)
    sys.argv[0] = "funclora"
    main()
