"""`make quick` leaves out dtypes, and neither a rule nor a layer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES, KINDS

ROOT = Path(__file__).parents[1]


def test_the_quick_loop_has_every_rule_on_every_layer_in_one_dtype() -> None:
    paths = re.search(r"^QUICK := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert paths is not None
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--quick"]
    done = subprocess.run([*argv, *paths[1].split()], cwd=ROOT, capture_output=True, text=True, check=True)
    values = {*re.findall(r"\[(.*)\]$", done.stdout, re.MULTILINE)}
    every = {f"{case.name}-{kind}" for case in CASES for kind in KINDS}
    assert values >= every
    assert {f"{each}-float32" for each in every} & values
    assert not {f"{each}-{dtype}" for each in every for dtype in ("float64", "bfloat16")} & values


def test_a_quick_test_starts_no_process(request: pytest.FixtureRequest) -> None:
    """Under --quick this test, like any that starts a process, is skipped where it does."""
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert not request.config.getoption("quick")
