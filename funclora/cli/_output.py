"""JSON output of the commands."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer

from funclora.errors import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(tree: Any) -> None:
    """Print one JSON value on stdout. NaN and infinity, which JSON does not have, become null; paths become texts."""
    typer.echo(json_text(tree))


def say_text(text: str, *, end: str = "\n") -> None:
    """A model's text on stdout: as it is for a program, without what steers a terminal for one."""
    typer.echo((printable(text) if sys.stdout.isatty() else text) + end, nl=False)


def json_text(tree: Any) -> str:
    """The same text, for a file."""
    return json.dumps(finite(tree), indent=2, default=str, allow_nan=False)


def json_line(tree: Any) -> str:
    """The same in one line, for a file of JSONL."""
    return json.dumps(finite(tree), ensure_ascii=False, default=str, allow_nan=False)


def finite(tree: Any) -> Any:
    """The same tree with None for each number that is not finite.

    Examples:
        >>> finite({"loss": [1.5, float("nan")], "n": 3})
        {'loss': [1.5, None], 'n': 3}
    """
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
