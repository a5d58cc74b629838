"""Prompts from the terminal or from a pipe, each answered before the next is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from funclora.cli._output import say_text

if TYPE_CHECKING:
    from funclora._apps.train.base import Base
    from funclora._apps.train.records import Record
    from funclora.cli._generate import Generator
    from funclora.cli._prompts import Reader

BASE = "(base)"


def refuse_bytes(text: str, where: str) -> None:
    """Raise for bytes that are not UTF-8 (Python reads them as surrogates), which no tokenizer accepts."""
    from funclora.errors import ConfigError

    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: contains bytes that are not UTF-8: {text!a:.60}. Encode it as UTF-8.")


def spoken(messages: list[dict[str, str]], where: str) -> Record:
    """The record of a conversation that was typed."""
    from funclora._apps.train.records import Record

    return Record({"messages": messages}, where, where)


def converse(
    generator: Generator, reader: Reader, adapter: str | None, names: list[str], base: Base, *, chat: bool
) -> None:
    """Prompts from the terminal or from a pipe, each answered before the next is read."""
    import sys

    from funclora.cli._prompts import known
    from funclora.errors import ConfigError

    asks = sys.stdin.isatty()
    if asks:
        typer.echo(f"{base.name} with {adapter or BASE}. Press Ctrl-D to exit.", err=True)
    said: list[dict[str, str]] = []
    for number in range(1, 1 << 62):
        line = _line(f"{adapter or BASE}> " if asks else None)
        if line is None:
            return
        where = f"line {number}"
        try:
            word, _, rest = line.strip().partition(" ")
            if word in ("/adapter", "/base"):
                adapter = None if word == "/base" else known(rest.strip(), names, where)
                generator.load(adapter)
                said = []
                continue
            if not line.strip():
                continue
            refuse_bytes(line, where)
            if chat:
                row = reader.messages(spoken([*said, {"role": "user", "content": line}], where), adapter)
            else:
                row = reader.text(line, adapter, where)
        except ConfigError as error:
            if not asks:
                raise
            typer.echo(" ".join(str(error).split()), err=True)
            continue
        try:
            answer = generator.stream(row, write_text)
            said += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.text}]
        except KeyboardInterrupt:
            if not asks:
                raise
        write_text("\n")


def _line(sign: str | None) -> str | None:
    """The next line, without its end; None at the end of the input."""
    import sys

    if sign is None:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    import contextlib

    with contextlib.suppress(ImportError):  # makes the arrow keys work
        import readline  # noqa: F401
    try:
        return input(sign)
    except EOFError:
        typer.echo("", err=True)
        return None


def write_text(text: str) -> None:
    """Print a part of an answer."""
    say_text(text, end="")
