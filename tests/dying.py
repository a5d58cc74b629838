"""Death by SIGKILL at a moment that is counted and not timed: the same on a fast machine and on a busy one."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any


def die_after(calls: int) -> None:
    """Kill this process when its thread has gone into and out of that many functions from here."""
    left = itertools.count(calls, -1)

    def profile(frame: Any, event: str, arg: Any) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def die_after_writing(name: str, calls: int) -> None:
    """The same, counted from where a file of that name is put into its place for the first time."""
    first = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(args[1])).name == name and next(first) == 0:
            die_after(calls)

    sys.addaudithook(hook)
