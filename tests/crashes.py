"""A script: kills what writes adapters at every step, and takes the disk's room and the right to write away.

`python crashes.py JOB FOLDER`, with what `test_writes_killed.py` has put into the folder. Jobs run in forks of this
process, after the imports, which take most of the time. Any assertion that fails ends it with an error.
"""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

import funclora as fl
from funclora.errors import FuncloraError
from funclora.io.peft.folder import load_peft, save_peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile")
NOBODY = 65534


def state(folder: Path) -> dict[str, bytes]:
    """Every file, by its path."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def jobs(root: Path) -> dict[str, Callable[[Path], Any]]:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(root / "base"))
    adapters, config = load_peft(root / "adapter", model)
    return {
        "save_peft": lambda out: save_peft(out, adapters, config),
        "save_gguf": lambda out: fl.save_gguf(out / "a.gguf", adapters, model),
        "combine": lambda out: fl.combine_peft([root / "adapter", root / "other"], out, [2.0, 1.0]),
        "extract": lambda out: fl.extract_adapter(root / "base", root / "tuned", out, r=1, rest="ignore"),
        "merge": lambda out: fl.merge_checkpoint(root / "base", root / "adapter", out),
    }


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def forked(task: Callable[[], Any]) -> int:
    """The exit code of a fork that does the task; 77 and a line for an error; -9 if it was killed."""
    pid = os.fork()
    if not pid:
        try:
            warnings.simplefilter("ignore")
            task()
            os._exit(0)
        except (OSError, FuncloraError) as error:
            say(type(error).__name__, " ".join(str(error).split()))
            os._exit(77)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(n: int, task: Callable[[], Any]) -> Callable[[], Any]:
    """The task, which ends at the n-th step after the first file or folder that it makes."""
    counter, began = itertools.count(), []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event == "os.mkdir" or writes:
            began.append(event)
        if began and event in STEPS and next(counter) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(hook)
        task()

    return run


def whole(found: dict[str, bytes], allowed: list[dict[str, bytes]]) -> bool:
    """It is one of the allowed states; or nothing that a reader would take for an adapter or a model."""
    visible = {name: raw for name, raw in found.items() if not name.rpartition("/")[2].startswith(".")}
    main = {CONFIG, "a.gguf", "config.json"}
    return visible in allowed or not main & visible.keys()


def check(name: str, job: Callable[[Path], Any], root: Path) -> None:
    out, expected, old = root / "out", root / "expected", root / "old"
    assert forked(lambda: job(expected)) == 0
    wanted, before = state(expected), {name: state(root / name) for name in ("base", "adapter", "other", "tuned")}
    over: list[bool] = [False, True] if name in ("save_peft", "save_gguf", "combine") else [False]
    kills = 0
    for replacing in over:
        older = state(old) if replacing else {}
        if replacing:  # an older version of the same
            file = {"save_gguf": "a.gguf"}.get(name, WEIGHTS)
            older = {**wanted, file: wanted[file][:-4] + b"\0\0\0\0"}
            if name != "save_gguf":
                older[CONFIG] = wanted[CONFIG].replace(b"\n}", b" \n}")
        for n in itertools.count():
            if n > 8 and n % 3:
                continue
            if replacing:
                out.mkdir(exist_ok=True)
                for file, raw in older.items():
                    (out / file).write_bytes(raw)
            code = forked(killed_at(n, lambda: job(out)))
            found = state(out) if out.exists() else {}
            assert whole(found, [older, wanted]), (n, sorted(found))
            assert {name: state(root / name) for name in before} == before, n
            if code == 0:
                assert found == wanted, (n, sorted(found))  # the drafts of all that were killed are gone
                break
            assert code == -signal.SIGKILL, (n, code)
            kills += 1
            if name in ("merge", "extract") and out.exists():
                assert found == wanted
                remove(out)
        remove(out)
    assert kills >= 3 * len(over), kills
    no_room(job, out, root, before)
    not_allowed(job, out)
    say(kills, sorted(file.name for file in root.iterdir()))


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def no_room(job: Callable[[Path], Any], out: Path, root: Path, before: dict[str, dict[str, bytes]]) -> None:
    """Files may not grow beyond some bytes, which is what a full disk looks like in the middle of a file."""

    def task() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        job(out)

    assert forked(task) == 77
    assert not out.exists(), sorted(state(out))
    assert {name: state(root / name) for name in before} == before


def not_allowed(job: Callable[[Path], Any], out: Path) -> None:
    """Another user, who may read but not write."""

    def task() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        else:
            out.parent.chmod(0o555)
        job(out)

    try:
        assert forked(task) == 77
    finally:
        out.parent.chmod(0o755)
    assert not out.exists()


def main() -> NoReturn:
    name, root = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    for file in root.rglob("*"):  # anyone may read
        file.chmod(0o755 if file.is_dir() else 0o644)
    check(name, jobs(root)[name], root)
    sys.exit(0)


if __name__ == "__main__":
    main()
