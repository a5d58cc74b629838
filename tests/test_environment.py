"""The suite in another environment: what a terminal, a language or a home say reaches no test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# Each of these failed before `conftest.py` hid the environment.
SENSITIVE = [
    "cli/test_conventions.py::test_help_is_light_and_complete[diff]",
    "cli/test_diff.py::test_complaints",
    "cli/test_inspect.py::test_the_table",
]
HOSTILE = {
    "COLUMNS": "40", "FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "TERM": "xterm-256color", "LC_ALL": "C",
    "TZ": "Pacific/Auckland", "HOME": "/proc", "HF_HOME": "/proc/hf", "XDG_CACHE_HOME": "/proc", "MPLBACKEND": "svg",
    "PYTHONWARNINGS": "default", "TRANSFORMERS_VERBOSITY": "debug", "WANDB_MODE": "online",
}  # fmt: skip


def test_tests_pass_in_another_environment() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", *SENSITIVE]
    done = subprocess.run(argv, cwd=TESTS, env=own | HOSTILE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(SENSITIVE)} passed" in done.stdout
