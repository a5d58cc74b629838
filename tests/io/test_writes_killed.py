"""Whatever writes an adapter or a model: killed, without room, without the right to: nothing half-written is left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import save_adapter, save_base

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits the size of files")


@pytest.mark.parametrize("job", ["save_peft", "save_gguf", "combine", "extract", "merge"])
def test_nothing_half_written_is_left(job: str, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)  # another user is to look into it
    cls = type(save_base(tmp_path / "base", "llama"))
    save_adapter(tmp_path / "base", cls, tmp_path / "adapter", target_modules=["q_proj"])
    save_adapter(tmp_path / "base", cls, tmp_path / "other", target_modules=["q_proj"])
    save_base(tmp_path / "tuned", "llama")
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # no threads of torch's that a fork would lose
    argv = [sys.executable, str(Path(__file__).parent.parent / "crashes.py"), job, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, env=one, check=False)
    assert done.returncode == 0, done.stderr
    *errors, last = done.stdout.splitlines()
    assert last.endswith("['adapter', 'base', 'expected', 'other', 'tuned']")
    full, forbidden = errors
    assert full.startswith("OSError [Errno 27] File too large")
    assert forbidden.startswith("PermissionError [Errno 13] Permission denied: ")
