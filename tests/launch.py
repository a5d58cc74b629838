"""Scripts in several processes, as users start them: with torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def python(folder: Path, *arguments: str, path: tuple[Path, ...] = ()) -> str:
    """What Python prints with these arguments in a folder. It can import what the tests can, and what is in `path`."""
    path_names = os.pathsep.join([*map(str, path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path_names},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=420)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun and Ray end their processes, which a kill would leave
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"{arguments} did not end:\n{output}") from None
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def torchrun(n: int, folder: Path, script: Path, *arguments: str, restarts: int = 0) -> str:
    """What a script prints in n processes, in a folder. It can import what is beside it, too."""
    options = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    again = ["--max-restarts", str(restarts)] if restarts else []
    return python(folder, *options, *again, str(script), *arguments, path=(script.parent,))


def results(n: int, folder: Path, script: Path, *arguments: str) -> list[Any]:
    """What each of n processes of a script wrote as JSON into the folder, which is its first argument."""
    torchrun(n, folder, script, str(folder), *arguments)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n)]
