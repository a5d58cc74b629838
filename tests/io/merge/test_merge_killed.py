"""A merge that is killed, or that the disk has no room for, leaves no result, and never a changed base."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import contents, save_adapter, save_base

import funclora as fl

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")

# Forks after the imports, which take most of the time. The child dies by SIGKILL at the n-th event that Python audits
# (opening, renaming, removing, ...) or the n-th piece of work, until it gets to the end.
KILLED = """
import itertools, os, resource, signal, sys
from pathlib import Path
import torch
import funclora as fl
from funclora.io.merge import write as _merge_write
base, adapter, out = map(Path, sys.argv[1:])

def state(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

def child(n):
    counter = itertools.count()
    def step(event=None, args=()):
        if event is None or event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"):
            if next(counter) == n:
                os.kill(os.getpid(), signal.SIGKILL)
    def stepping(function):
        def wrapped(*args):
            step()
            return function(*args)
        return wrapped
    _merge_write.spill, _merge_write.copy_range = stepping(_merge_write.spill), stepping(_merge_write.copy_range)
    started = []
    def hook(event, args):
        if event == "os.mkdir":
            started.append(event)
        if started:  # from the first folder that is made
            step(event, args)
    sys.addaudithook(hook)
    fl.merge_checkpoint(base, adapter, out)
    os._exit(0)

torch.set_num_threads(1)
fl.merge_checkpoint(base, adapter, out, dry_run=True)  # the last imports
before, kills = state(base), 0

# No room in the middle of a file: a limit on its size stands for a full disk.
pid = os.fork()
if not pid:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        fl.merge_checkpoint(base, adapter, out)
    except OSError as error:
        os._exit(error.errno)
    os._exit(0)
print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), sorted(os.listdir(base.parent)))
for n in itertools.count():
    if n > 12 and n % 5:
        continue
    pid = os.fork()
    if not pid:
        try:
            child(n)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert state(base) == before, n
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, n
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
    if out.exists():  # the rename was the last thing that happened
        assert (out / "model.safetensors.index.json").exists()
        break
print(kills)
"""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    cls = type(save_base(tmp_path / "base", "llama", torch.bfloat16, "5KB"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path


def test_killed_at_any_point_and_without_room(folders: Path) -> None:
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # no threads of torch's that a fork would lose
    argv = [sys.executable, "-c", KILLED, *(str(folders / name) for name in ("base", "adapter", "out"))]
    printed = subprocess.run(argv, check=True, capture_output=True, text=True, env=one).stdout
    full, kills = printed.splitlines()
    assert full == f"{errno.EFBIG} ['adapter', 'base']"
    assert int(kills) > 15
    fl.merge_checkpoint(folders / "base", folders / "adapter", folders / "plain")
    assert contents(folders / "out") == contents(folders / "plain")
    assert sorted(f.name for f in folders.iterdir()) == ["adapter", "base", "out", "plain"]


def test_two_at_the_same_place(folders: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(fl.errors.ConfigError, match="another process is writing"):
            fl.merge_checkpoint(folders / "base", folders / "adapter", folders / "out")

    fl.merge_checkpoint(folders / "base", folders / "adapter", folders / "out", progress=second)
    assert (folders / "out" / "config.json").exists()
