"""A script: of each command that writes, a second process, while the first one has only begun to read.

`python second.py FOLDER`, with inputs in `FOLDER/in`. The processes are forks of this one, after the imports, which
take most of the time. For each command a line of JSON: what the test wants to know.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import transformers
from checkpoints import contents

import funclora.io.hf.extract
import funclora.io.merge.merge
import funclora.io.peft.combine  # noqa: F401
from funclora.cli._app import app

mpl.use("Agg")
SMALL = ["--rank", "2", "--targets", "q_proj", "--steps", "2", "--batch", "1"]


def commands(root: Path) -> dict[str, list[str]]:
    given, out = root / "in", root / "out"
    text = ["--model", f"{given / 'model'}", "--data", f"{given / 'text.jsonl'}", "--out", f"{out / 'run'}"]
    return {
        "train": ["train", *text, *SMALL],
        "sweep": [
            "sweep", *text, *SMALL, "--lr", "1e-3,1e-2", "--method", "lora", "--eval-every", "1", "--context", "8",
            "--validation-split", "0.3", "--rows", "2", "--halving", "0", "--memory", "1TiB", "--save", "1",
        ],
        "merge": ["merge", f"{given / 'base'}", f"{given / 'adapter'}", "-o", f"{out / 'merged'}"],
        "extract": [
            "extract", f"{given / 'base'}", f"{given / 'tuned'}", "-o", f"{out / 'extracted'}", "--rank", "1",
            "--ignore-rest",
        ],
        "combine": ["combine", f"{given / 'adapter'}", f"{given / 'other'}", "-o", f"{out / 'both'}", "--overwrite"],
        "to gguf": [
            "convert", f"{given / 'adapter'}", "--to", "gguf", "--base", f"{given / 'base'}", "-o",
            f"{out / 'a.gguf'}", "--overwrite",
        ],
        "from gguf": [
            "convert", f"{given / 'adapter.gguf'}", "--from", "gguf", "--base", f"{given / 'base'}", "-o",
            f"{out / 'peft'}", "--overwrite",
        ],
    }  # fmt: skip


def forked(line: list[str], said: Path, inputs: str = "", reading: int = -1, go: int = -1) -> int:
    """The process id of a fork that runs a command; it waits for `go` when it opens the first of its inputs."""
    pid = os.fork()
    if pid:
        return pid
    waited: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not waited and inputs and str(args[0]).startswith(inputs):
            waited.append(str(args[0]))
            os.write(reading, b".")
            os.read(go, 1)

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.addaudithook(hook)
    code: object = 1
    try:
        app(line)
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tried(root: Path, line: list[str]) -> dict[str, Any]:
    """What happened: exit codes and words of both, and whether the second one changed anything."""
    (read, reading), (go, release) = os.pipe(), os.pipe()
    first = forked(line, root / "first.txt", f"{root / 'in'}{os.sep}", reading, go)
    os.close(reading)
    waiting = os.read(read, 1) == b"."  # nothing, if the first ends without having read
    before = contents(root / "out")
    second = ended(forked(line, root / "second.txt"))
    same = contents(root / "out") == before
    if waiting:
        os.write(release, b".")
    found = {
        "waiting": waiting, "codes": [ended(first), second], "same": same,
        "said": [(root / f"{name}.txt").read_text() for name in ("first", "second")],
        "made": sorted(contents(root / "out")),
    }  # fmt: skip
    for each in (read, go, release):
        os.close(each)
    return found


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    transformers.AutoModelForCausalLM.from_pretrained(root / "in" / "model")  # the last imports
    for name, line in commands(root).items():
        (root / "out").mkdir()
        sys.stdout.write(json.dumps({"command": name, **tried(root, line)}) + "\n")
        sys.stdout.flush()
        (root / "out").rename(root / f"out of {name}")


if __name__ == "__main__":
    main()
