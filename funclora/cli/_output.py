"""Output of the commands: JSON, texts, and files of their own."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
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


def write_lines(file: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSONL."""
    from funclora._files.atomic import replace_files

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8") as stream:
            stream.writelines(json_line(value) + "\n" for value in values)

    replace_files(file.parent, {file.name: write})


@contextlib.contextmanager
def claimed_out(file: Path, *, overwrite: bool, option: str = "--out") -> Iterator[None]:
    """Keep other processes from writing the file that an option names, before anything is computed for it.

    Raises:
        ConfigError: another process writes it; or it exists, and may not be replaced.
        OSError: its folder cannot be made.
    """
    from funclora._files.locks import claimed_file
    from funclora.errors import ConfigError

    busy = ConfigError(f"{option}: another process is writing {file} at this moment. Wait for it to end.")
    with claimed_file(file, busy):
        if file.exists() and not overwrite:
            raise ConfigError(f"{option}: {file} already exists. Give another file, or --overwrite.")
        yield


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
