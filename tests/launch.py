"""Scripts in several processes, as users start them: with torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch import multiprocessing

WAIT = 270.0  # seconds for the processes of a launch: less than pytest gives the test


def python(folder: Path, *arguments: str, path: tuple[Path, ...] = (), within: float = WAIT) -> str:
    """What Python prints with these arguments in a folder. It can import what the tests can, and what is in `path`."""
    path_names = os.pathsep.join([*map(str, path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path_names, "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{arguments} did not end in {within:g} seconds: {stopped(process)}") from None
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def stopped(launcher: subprocess.Popen[str]) -> str:
    """Which ranks of a launch still run, and all that it prints: at its end, where each of them is."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    ranks = []
    for child in children:
        with contextlib.suppress(psutil.Error):
            if (rank := child.environ().get("RANK")) is not None:
                ranks.append(int(rank))
                child.send_signal(signal.SIGABRT)  # Python's fault handler prints, even if a thread holds its lock
    launcher.terminate()  # torchrun and Ray end their processes, which a kill would leave
    try:
        output, _ = launcher.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        output = "nothing that could be read"
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    return f"ranks {sorted(ranks)} still run. The launch printed:\n{output}"


def spawned(function: Callable[..., None], n: int, *arguments: Any, within: float = WAIT) -> None:
    """Call a function in n processes, with the rank as its first argument."""
    spawn: Callable[..., Any] = multiprocessing.spawn
    context = spawn(function, arguments, nprocs=n, join=False)
    deadline = time.monotonic() + within
    try:
        while not context.join(timeout=1.0):
            left = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            assert time.monotonic() < deadline, f"ranks {left} did not end in {within:g} seconds"
    finally:
        for process in context.processes:
            process.kill()


def torchrun(n: int, folder: Path, script: Path, *arguments: str, restarts: int = 0, within: float = WAIT) -> str:
    """What a script prints in n processes, in a folder. It can import what is beside it, too."""
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    again = ["--max-restarts", str(restarts)] if restarts else []
    return python(folder, *options, *again, str(script), *arguments, path=(script.parent,), within=within)


def results(n: int, folder: Path, script: Path, *arguments: str, within: float = WAIT) -> list[Any]:
    """What each of n processes of a script wrote as JSON into the folder, which is its first argument."""
    torchrun(n, folder, script, str(folder), *arguments, within=within)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n)]
