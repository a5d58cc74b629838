"""Runs commands one after the other in each process of a launch: how each ended, and what it printed, as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from funclora.cli._app import app


def ended(arguments: list[str]) -> dict[str, Any]:
    """The exit code, stdout and stderr of a command."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(arguments, prog_name="funclora")
        except SystemExit as end:
            code = int(end.code or 0)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def main(file: str) -> None:
    torch.set_num_threads(1)
    commands = json.loads(Path(file).read_text(encoding="utf-8"))
    results = [ended(command) for command in commands]
    Path(f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
